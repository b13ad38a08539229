//! Gradients of everything between items and the loss.

use burn::tensor::Tensor;

use super::*;
use crate::fusion::PREFIX;
use crate::{Mode, Recompute, RecomputedBlocks, loss};

/// The gradient of each trained tensor, by name; `None` where it took no part.
pub(super) fn of(model: &Model, loss: &Tensor<1>) -> Vec<(String, Option<Vec<f32>>)> {
    struct Gradients<'a> {
        gradients: &'a burn::tensor::Gradients,
        found: Vec<(String, Option<Vec<f32>>)>,
    }
    impl ParameterVisitor for Gradients<'_> {
        fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
            let gradient = tensor.grad(self.gradients).map(values);
            self.found.push((name.to_owned(), gradient));
        }
    }
    let mut visitor = Gradients {
        gradients: &loss.backward(),
        found: Vec::new(),
    };
    model.clone().visit_trainable(&mut visitor);
    visitor.found
}

/// A bias of the keys shifts all scores of a query alike, which the softmax does not see.
pub(super) fn cancels(name: &str) -> bool {
    name.ends_with(".key.bias")
}

fn loss_of(model: &Model) -> Tensor<1> {
    let input = pack(&[samples()], 52, 5);
    let targets = integers(vec![0, 2, 1, 2], [4]);
    let logits = model.forward(&input, Mode::Train { dropout_seed: 1 });
    loss::multiclass(logits, targets, None)
}

/// Moves one tensor along a direction.
struct Along<'a> {
    name: &'a str,
    direction: &'a [f32],
    distance: f32,
}

impl ParameterVisitor for Along<'_> {
    fn visit<const D: usize>(&mut self, name: &str, _: ParameterGroup, tensor: &mut Tensor<D>) {
        if name == self.name {
            let step = self.direction.iter().map(|d| d * self.distance).collect();
            let moved = tensor.clone().inner() + floats(step, tensor.dims());
            *tensor = moved.autodiff().require_grad();
        }
    }
}

#[test]
fn recomputed_blocks_leave_them_as_they_are_to_the_bit() {
    for (base, pooling) in [("llama3", Pooling::Last), ("bert", Pooling::Mean)] {
        let mut model = moved(base, pooling);
        let plain = of(&model, &loss_of(&model));
        for blocks in [RecomputedBlocks::All, RecomputedBlocks::First(1)] {
            for offload in [false, true] {
                model.set_recompute(Recompute { blocks, offload });
                assert!(of(&model, &loss_of(&model)) == plain, "{base} {blocks:?}");
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (base, pooling) in [("llama3", Pooling::Last), ("bert", Pooling::Mean)] {
        let model = moved(base, pooling);
        let gradients = of(&model, &loss_of(&model));
        let mut checked = 0;
        for (name, gradient) in &gradients {
            if !name.starts_with(PREFIX) {
                continue;
            }
            let gradient = gradient
                .as_ref()
                .unwrap_or_else(|| panic!("{name} has a gradient"));
            let norm = gradient
                .iter()
                .map(|g| f64::from(*g).powi(2))
                .sum::<f64>()
                .sqrt();
            assert!(
                norm > 0.0 || cancels(name),
                "{base}: {name} gets a gradient"
            );
            // Along the gradient, and along one that every element has a part in.
            let along: Vec<f32> = gradient.iter().map(|g| g / norm.max(1e-9) as f32).collect();
            let scattered: Vec<f32> = Stream::new(2, name)
                .uniform(gradient.len(), 1.0)
                .iter()
                .map(|u| u.signum() / (gradient.len() as f32).sqrt())
                .collect();
            for direction in [along, scattered] {
                let expected: f64 = gradient
                    .iter()
                    .zip(&direction)
                    .map(|(g, d)| f64::from(g * d))
                    .sum();
                let distance = 5e-3;
                let at = |distance| {
                    let mut model = model.clone();
                    model.visit_trainable(&mut Along {
                        name,
                        direction: &direction,
                        distance,
                    });
                    f64::from(values(loss_of(&model))[0])
                };
                let slope = (at(distance) - at(-distance)) / f64::from(2.0 * distance);
                // The loss is around 4 and has 24 bits.
                let rounding = 4.0 * 2f64.powi(-21) / f64::from(distance);
                assert!(
                    (slope - expected).abs() < 0.02 * norm + rounding,
                    "{base} {name}: {slope} by differences, {expected} by autodiff"
                );
                checked += 1;
            }
        }
        assert!(checked > 200, "{checked}");
    }
}

#[test]
fn the_first_update_opens_the_way_to_every_tensor() {
    for (base, pooling) in MODELS {
        let mut model = load(base, pooling);
        let reached = |model: &Model| -> Vec<String> {
            of(model, &loss_of(model))
                .into_iter()
                .filter(|(name, gradient)| {
                    let gradient = gradient.as_ref().unwrap_or_else(|| panic!("{name}"));
                    name.starts_with(PREFIX) && gradient.iter().any(|&g| g != 0.0)
                })
                .map(|(name, _)| name)
                .collect()
        };
        // At first the projector's last weight is zero and hides what lies before it.
        let before = reached(&model);
        assert!(before.contains(&"fusion.xray.projector.second.weight".to_owned()));
        assert!(before.contains(&"fusion.genes.missing".to_owned()));
        assert!(before.contains(&"fusion.ecg.type".to_owned()));
        assert!(before.contains(&"fusion.shared.site".to_owned()));
        assert!(before.contains(&"fusion.shared.time".to_owned()));
        assert!(!before.iter().any(|name| name.contains("encoder")));
        struct Descend<'a>(&'a burn::tensor::Gradients);
        impl ParameterVisitor for Descend<'_> {
            fn visit<const D: usize>(
                &mut self,
                _: &str,
                _: ParameterGroup,
                tensor: &mut Tensor<D>,
            ) {
                let gradient = tensor.grad(self.0).expect("everything takes part");
                let moved = tensor.clone().inner() - gradient * 0.1;
                *tensor = moved.autodiff().require_grad();
            }
        }
        let gradients = loss_of(&model).backward();
        model.visit_trainable(&mut Descend(&gradients));
        let mut fused: Vec<String> = trained(&model)
            .0
            .into_iter()
            .map(|(name, ..)| name)
            .collect();
        fused.retain(|name| name.starts_with(PREFIX));
        fused.retain(|name| !cancels(name));
        let after = reached(&model);
        for name in fused {
            assert!(after.contains(&name), "{base}: {name} is reached");
        }
    }
}

#[test]
fn what_took_no_part_has_no_gradient() {
    let model = moved("bert", Pooling::Mean);
    let sample = vec![text(1, 3), item(GENES, None), item(WAVE, Some(0))];
    let input = separate(&[sample], 12);
    let logits = model.forward(&input, Mode::Train { dropout_seed: 1 });
    let targets = integers(vec![1], [1]);
    let loss = loss::multiclass(logits, targets, None);
    let reached: Vec<String> = of(&model, &loss)
        .into_iter()
        .filter(|(name, gradient)| name.starts_with(PREFIX) && gradient.is_some())
        .map(|(name, _)| name)
        .collect();
    let any = |prefix: &str| reached.iter().any(|name| name.starts_with(prefix));
    assert!(any("fusion.genes.missing") && any("fusion.genes.type") && any("fusion.ecg.encoder"));
    assert!(!any("fusion.genes.encoder") && !any("fusion.genes.projector"));
    assert!(!any("fusion.ecg.missing") && !any("fusion.xray") && !any("fusion.voice"));
}
