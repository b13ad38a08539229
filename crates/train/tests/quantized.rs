//! Runs on a frozen base in 8 or 4 bits.

mod common;

use calor_train::{StopFlag, TrainOutcome};
use common::{AfterStep, Home, Kind, adapter_bytes, finish, losses, repeatable};

const NF4: &str = "model.quantization=nf4";

#[test]
fn training_on_a_quantised_base_learns_and_keeps_the_base_small() {
    let home = Home::new(Kind::Llama);
    let set = ["train.epochs=6", "train.learning_rate=3e-2"];
    let dense = finish(&home.options("dense", &set));
    for (run, quantization) in [("int8", "model.quantization=int8"), ("nf4", NF4)] {
        let report = finish(&home.options(run, &[&set[..], &[quantization]].concat()));
        let losses = losses(&home.path(run));
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let end = losses.len() - 8;
        assert!(
            mean(&losses[end..]) < 0.3 * mean(&losses[..8]),
            "the loss does not go down: {losses:?}"
        );
        assert_eq!(
            report.model.frozen_parameters,
            dense.model.frozen_parameters
        );
        if run == "int8" {
            // In 4 bits the values of the scales' codes outweigh matrices of 16 × 16.
            assert!(report.model.frozen_bytes < dense.model.frozen_bytes);
        }
        // The base that the adapter names is the checkpoint, not what it was quantised to.
        let config = &adapter_bytes(&home.path(run))["adapter_config.json"];
        assert_eq!(
            config,
            &adapter_bytes(&home.path("dense"))["adapter_config.json"]
        );
    }
}

#[test]
fn a_stopped_run_on_a_quantised_base_goes_on_bit_for_bit() {
    for kind in [Kind::Bert, Kind::Llama] {
        let home = Home::new(kind);
        finish(&home.options("whole", &[NF4]));
        let stop = StopFlag::new();
        let flag = stop.clone();
        let mut observer = AfterStep(|progress: &calor_train::StepProgress| {
            if progress.step == 7 {
                flag.set();
            }
        });
        match calor_train::train(&home.options("parts", &[NF4]), &mut observer, &stop).unwrap() {
            TrainOutcome::Stopped { step, .. } => assert_eq!(step, 7),
            TrainOutcome::Finished(_) => panic!("it was asked to stop"),
        }
        finish(&home.resume("parts", &[NF4]));
        let (whole, parts) = (home.path("whole"), home.path("parts"));
        assert!(repeatable(&whole) == repeatable(&parts), "the same steps");
        assert!(
            adapter_bytes(&whole) == adapter_bytes(&parts),
            "the same adapter"
        );
    }
}
