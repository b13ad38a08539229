use serde::Deserialize;

use super::*;
use crate::optimizer::trajectories::formula;

#[derive(Deserialize)]
struct Fixture {
    signed: Case,
    unsigned: Case,
}

#[derive(Deserialize)]
struct Case {
    map: Vec<f32>,
    codes: Vec<i32>,
    largest: Vec<f32>,
    restored: Vec<f32>,
}

fn device() -> Device {
    Device::flex()
}

fn values(tensor: Tensor<1>) -> Vec<f32> {
    tensor.to_data().try_to_vec().unwrap()
}

#[test]
fn codes_and_what_they_stand_for_are_bitsandbytes() {
    let fixture: Fixture =
        serde_json::from_str(include_str!("../../tests/fixtures/optimizers.json")).unwrap();
    for (signed, case) in [(true, fixture.signed), (false, fixture.unsigned)] {
        assert_eq!(code_values(signed), case.map);
        let mut numbers = formula(3, 300, 7);
        if !signed {
            numbers.iter_mut().for_each(|value| *value = value.abs());
        }
        let code = CodeMap::new(signed, &device());
        let quantised = Quantised::quantise(float_tensor(numbers, &device()), &code);
        let codes = unpack(quantised.codes.clone(), 2);
        let codes: Vec<i32> = codes.to_data().try_to_vec().unwrap();
        assert_eq!(codes[..300], case.codes);
        assert_eq!(values(quantised.largest.clone()), case.largest);
        assert_eq!(values(quantised.restored(&code)), case.restored);
    }
}

#[test]
fn what_is_a_value_of_the_code_comes_back_exactly() {
    for signed in [true, false] {
        let code = CodeMap::new(signed, &device());
        let numbers: Vec<f32> = code_values(signed)
            .iter()
            .map(|value| value * 3.0)
            .collect();
        let quantised = Quantised::quantise(float_tensor(numbers, &device()), &code);
        let codes: Vec<i32> = unpack(quantised.codes.clone(), 1)
            .to_data()
            .try_to_vec()
            .unwrap();
        assert_eq!(codes, (0..256).collect::<Vec<_>>());
    }
}

#[test]
fn zeros_stay_zeros() {
    let code = CodeMap::new(true, &device());
    assert_eq!(
        values(Quantised::zeros(5, &device()).restored(&code)),
        [0.0; 5]
    );
    let zeros = Quantised::quantise(float_tensor(vec![0.0; 5], &device()), &code);
    assert_eq!(values(zeros.restored(&code)), [0.0; 5]);
}
