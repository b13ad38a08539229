use super::*;
use crate::optimizer::{AccumulatedGradients, Optimizer, OptimizerOptions, TensorRules};

struct Two {
    weight: Tensor<2>,
    bias: Tensor<1>,
}

impl Parameters for Two {
    fn visit_parameters<V: ParameterVisitor>(&mut self, visitor: &mut V) {
        visitor.visit("layer.weight", ParameterGroup::Adapter, &mut self.weight);
        visitor.visit("layer.bias", ParameterGroup::Head, &mut self.bias);
    }
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn two(rows: usize) -> Two {
    let values: Vec<f32> = (0..rows * 2)
        .map(|index| (index as f32 + 0.1).ln())
        .collect();
    Two {
        weight: Tensor::from_data(TensorData::new(values, [rows, 2]), &device()).require_grad(),
        bias: Tensor::from_data(
            TensorData::new(vec![1.0f32 / 3.0, f32::MIN_POSITIVE], [2]),
            &device(),
        )
        .require_grad(),
    }
}

fn trained() -> (Two, Optimizer) {
    let mut model = two(3);
    let mut optimizer = Optimizer::new(OptimizerOptions::default());
    for _ in 0..3 {
        let loss = model.weight.clone().sin().sum() + model.bias.clone().exp().sum();
        let mut gradients = AccumulatedGradients::default();
        gradients.add(&mut model, &mut loss.backward());
        optimizer.update(&mut model, gradients, &TensorRules::uniform(0.1), 1.0);
    }
    (model, optimizer)
}

fn bits(model: &Two) -> Vec<u32> {
    let mut all: Vec<f32> = model.weight.to_data().try_to_vec().unwrap();
    all.extend(model.bias.to_data().try_to_vec::<f32>().unwrap());
    all.into_iter().map(f32::to_bits).collect()
}

fn state(step: u64) -> TrainerState {
    let mut state = TrainerState::new("hash".to_owned());
    state.step = step;
    state.best = Some(Best {
        step,
        metric: Metric::Auroc,
        value: 0.1 + 0.2,
    });
    state
}

fn no_adapter(_: &Path) -> Result<(), TrainError> {
    Ok(())
}

#[test]
fn tensors_moments_and_state_come_back_bit_for_bit() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(home.path(), 2);
    let (mut model, optimizer) = trained();
    checkpoints
        .write(&mut model, &optimizer.save(), &state(3), no_adapter)
        .unwrap();
    let (found, broken) = checkpoints.latest().unwrap();
    let found = found.unwrap();
    assert!(broken.is_empty());
    assert_eq!(found.state, state(3));
    let mut other = two(3);
    let mut restored = Optimizer::new(OptimizerOptions::default());
    let states = Checkpoints::restore(&found, &mut other, &device()).unwrap();
    restored.restore(states, &device()).unwrap();
    assert_eq!(bits(&other), bits(&model));
    assert_eq!(restored.save(), optimizer.save());
    assert!(other.weight.is_require_grad());
}

#[test]
fn only_the_newest_are_kept_and_steps_are_compared_as_numbers() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(home.path(), 2);
    let (mut model, optimizer) = trained();
    for step in [9, 10, 100] {
        checkpoints
            .write(&mut model, &optimizer.save(), &state(step), no_adapter)
            .unwrap();
    }
    let steps: Vec<u64> = checkpoints
        .list()
        .unwrap()
        .into_iter()
        .map(|(step, _)| step)
        .collect();
    assert_eq!(steps, [10, 100]);
}

#[test]
fn what_a_killed_process_left_is_not_taken_for_a_checkpoint() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(home.path(), 9);
    let (mut model, optimizer) = trained();
    for step in 1..=5 {
        checkpoints
            .write(&mut model, &optimizer.save(), &state(step), no_adapter)
            .unwrap();
    }
    let folder = home.path().join("checkpoints");
    // Killed while filling: the hidden folder. Cut off by a full disk or a crash of
    // the machine: a file missing, shorter, or with other bytes.
    fs::create_dir(folder.join(".step-6.partial")).unwrap();
    fs::remove_file(folder.join("step-5/manifest.json")).unwrap();
    let tensors = fs::read(folder.join("step-4").join(TENSORS)).unwrap();
    fs::write(
        folder.join("step-4").join(TENSORS),
        &tensors[..tensors.len() - 4],
    )
    .unwrap();
    let mut flipped = fs::read(folder.join("step-3").join(TENSORS)).unwrap();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(folder.join("step-3").join(TENSORS), &flipped).unwrap();
    let (found, broken) = checkpoints.latest().unwrap();
    assert_eq!(found.unwrap().state.step, 2);
    assert_eq!(broken.len(), 3);
    checkpoints.clean().unwrap();
    assert!(!folder.join(".step-6.partial").exists());
}

#[test]
fn another_models_checkpoint_is_refused_by_tensor_name() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(home.path(), 1);
    let (mut model, optimizer) = trained();
    checkpoints
        .write(&mut model, &optimizer.save(), &state(3), no_adapter)
        .unwrap();
    let found = checkpoints.latest().unwrap().0.unwrap();
    let error = Checkpoints::restore(&found, &mut two(4), &device())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`layer.weight` is [3, 2] there and [4, 2] in the model"),
        "{error}"
    );
}

#[test]
fn patience_counts_evaluations_without_a_better_value() {
    let mut state = TrainerState::new(String::new());
    for (step, value, better, stopped) in [
        (1, f64::NAN, false, false),
        (2, 0.7, true, false),
        (3, 0.7, false, false),
        (4, f64::NAN, false, true),
    ] {
        state.step = step;
        assert_eq!(
            state.evaluated(Metric::Auroc, value, 2),
            better,
            "step {step}"
        );
        assert_eq!(state.stopped_early, stopped, "step {step}");
    }
    assert_eq!(state.best.unwrap().step, 2);
    let mut state = TrainerState::new(String::new());
    assert!(state.evaluated(Metric::Loss, 2.0, 1) && state.evaluated(Metric::Loss, 1.0, 1));
    assert!(
        !state.evaluated(Metric::Loss, 3.0, 0) && !state.stopped_early,
        "a patience of 0 never stops"
    );
}
