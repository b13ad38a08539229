use super::*;
use burn::tensor::{Device, TensorData};
use calor_meter::{EnergyOptions, MeteredDevice, Purpose};

/// An adapter pair and a head; `uses_adapter` decides what the loss depends on.
struct Pair {
    a: Tensor<2>,
    b: Tensor<2>,
    head: Tensor<1>,
}

impl Parameters for Pair {
    fn visit_parameters<V: ParameterVisitor>(&mut self, visitor: &mut V) {
        visitor.visit("q.lora_A.weight", ParameterGroup::Adapter, &mut self.a);
        visitor.visit("q.lora_B.weight", ParameterGroup::Adapter, &mut self.b);
        visitor.visit("head", ParameterGroup::Head, &mut self.head);
    }
}

fn pair() -> Pair {
    let device = Device::flex().autodiff();
    let matrix = |values: [f32; 4]| {
        Tensor::from_data(TensorData::new(values.to_vec(), [2, 2]), &device).require_grad()
    };
    Pair {
        a: matrix([0.5, -0.25, 1.0, 0.75]),
        b: matrix([0.0; 4]),
        head: Tensor::from_data(TensorData::new(vec![1.0f32, 2.0], [2]), &device).require_grad(),
    }
}

fn adamw(max_grad_norm: f64, has_adapter: bool) -> TrainStep {
    let options = OptimizerOptions::default();
    TrainStep::new(
        options,
        TensorRules::uniform(1e-3),
        max_grad_norm,
        has_adapter,
    )
}

fn run(
    step: &mut TrainStep,
    model: &mut Pair,
    factor: f64,
    loss: impl FnMut(&Pair, f32, &mut Meter) -> Result<Tensor<1>, TrainError>,
) -> Result<StepResult, TrainError> {
    let mut meter = Meter::open(&EnergyOptions::default(), &MeteredDevice::Cpu).unwrap();
    meter.begin(Purpose::Training);
    step.run(
        model,
        [1.0, 2.0].into_iter(),
        loss,
        2.0,
        factor,
        7,
        &mut meter,
    )
}

fn head_only(model: &Pair, scale: f32, _: &mut Meter) -> Result<Tensor<1>, TrainError> {
    Ok(model.head.clone().square().sum() * scale)
}

fn through_adapter(model: &Pair, scale: f32, _: &mut Meter) -> Result<Tensor<1>, TrainError> {
    let product = model.b.clone().matmul(model.a.clone());
    Ok((product + 1.0).square().sum() * scale + model.head.clone().sum())
}

#[test]
fn the_loss_is_the_sum_over_micro_batches_by_the_supervised_count() {
    let mut step = adamw(0.0, false);
    let result = run(&mut step, &mut pair(), 1.0, head_only).unwrap();
    assert!((result.loss - 5.0 * 3.0 / 2.0).abs() < 1e-6);
    // The gradient is 2·head·(1 + 2)/2.
    assert!((result.grad_norm.unwrap() - 3.0 * 5f64.sqrt()).abs() < 1e-5);
}

#[test]
fn an_adapter_that_nothing_depends_on_is_an_error() {
    let mut step = adamw(1.0, true);
    let error = run(&mut step, &mut pair(), 1.0, head_only).unwrap_err();
    assert!(
        matches!(
            error,
            TrainError::AdapterDidNotMove {
                step: 7,
                tensors: 2
            }
        ),
        "{error}"
    );
    // Without an adapter there is nothing to watch.
    let mut step = adamw(1.0, false);
    run(&mut step, &mut pair(), 1.0, head_only).unwrap();
}

#[test]
fn an_adapter_may_rest_while_the_learning_rate_is_zero_and_has_to_move_after() {
    let mut step = adamw(1.0, true);
    let mut model = pair();
    run(&mut step, &mut model, 0.0, through_adapter).unwrap();
    let moved = run(&mut step, &mut model, 1.0, through_adapter).unwrap();
    assert!(moved.unmoved.is_empty());
    let values: Vec<f32> = model.b.to_data().try_to_vec().unwrap();
    assert!(values.iter().all(|value| *value != 0.0));
}

#[test]
fn a_loss_that_is_not_finite_changes_nothing() {
    let mut step = adamw(1.0, false);
    let mut model = pair();
    let before: Vec<f32> = model.head.to_data().try_to_vec().unwrap();
    let error = run(&mut step, &mut model, 1.0, |model, _, _| {
        Ok(model.head.clone().sum() * f32::INFINITY)
    });
    let error = error.unwrap_err();
    let TrainError::NonFinite {
        what: "the loss",
        step: 7,
        ..
    } = error
    else {
        panic!("{error}");
    };
    let after: Vec<f32> = model.head.to_data().try_to_vec().unwrap();
    assert_eq!(before, after);
}

/// A gradient beyond f32 at the first loss scale, but not at half of it.
#[test]
fn an_overflow_under_the_loss_scale_leaves_the_step_out_and_halves_it() {
    let mut step = adamw(0.0, false);
    step.loss_scale = Some(LossScale::default());
    let mut model = pair();
    let values = |model: &Pair| -> Vec<f32> { model.head.to_data().try_to_vec().unwrap() };
    let before = values(&model);
    // The gradient is 3e33/2 · 3 · scale in each of two places.
    let loss =
        |model: &Pair, scale: f32, _: &mut Meter| Ok(model.head.clone().sum() * scale * 1e34);
    let skipped = run(&mut step, &mut model, 1.0, loss).unwrap();
    assert_eq!((skipped.grad_norm, &values(&model)), (None, &before));
    assert_eq!(step.loss_scale.unwrap().factor(), 32_768.0);

    // Later steps are those without a scale, to the bit: it is a power of two.
    let mut plain = adamw(1.0, false);
    let mut scaled = adamw(1.0, false);
    scaled.loss_scale = Some(LossScale::default());
    let (mut one, mut other) = (pair(), pair());
    for _ in 0..3 {
        let plain = run(&mut plain, &mut one, 1.0, through_adapter).unwrap();
        let scaled = run(&mut scaled, &mut other, 1.0, through_adapter).unwrap();
        assert_eq!(plain, scaled);
        assert_eq!(values(&one), values(&other));
    }
}
