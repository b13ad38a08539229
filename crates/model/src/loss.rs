//! Losses of the classifier heads.
//!
//! Each is the sum over samples, in f32, as a tensor of one element: the caller divides by the
//! number of supervised samples of the whole optimizer step, whatever its micro-batches.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor};

/// Binary cross-entropy with logits `[samples, 1]` and targets 0 or 1 `[samples]`.
///
/// `class_weights` multiply the terms of the negative and of the positive samples.
pub fn binary(logits: Tensor<2>, targets: Tensor<1>, class_weights: Option<[f32; 2]>) -> Tensor<1> {
    let [samples, _] = logits.dims();
    let logits = logits.cast(DType::F32).reshape([samples]);
    let targets = targets.cast(DType::F32);
    let [negative, positive] = class_weights.unwrap_or([1.0, 1.0]);
    // softplus(x) = −log(1 − p) and softplus(−x) = −log p.
    let terms = targets.clone() * softplus(-logits.clone()) * positive
        + (targets.neg() + 1.0) * softplus(logits) * negative;
    terms.sum()
}

/// Cross-entropy of the softmax over logits `[samples, classes]`, targets `[samples]`.
///
/// `class_weights` `[classes]` multiply each sample's term by its class's weight.
pub fn multiclass(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    class_weights: Option<Tensor<1>>,
) -> Tensor<1> {
    let [samples, _] = logits.dims();
    let log_probabilities = log_softmax(logits.cast(DType::F32), 1);
    let terms = log_probabilities
        .gather(1, targets.clone().reshape([samples, 1]))
        .reshape([samples]);
    let terms = match class_weights {
        Some(weights) => terms * weights.cast(DType::F32).select(0, targets),
        None => terms,
    };
    terms.sum().neg()
}

/// Binary cross-entropy of every label: logits and targets (0 or 1) `[samples, labels]`, the mean
/// over labels as in PyTorch's `BCEWithLogitsLoss`.
///
/// `positive_weights` `[labels]` multiply the terms of positive targets, PyTorch's `pos_weight`.
pub fn multilabel(
    logits: Tensor<2>,
    targets: Tensor<2>,
    positive_weights: Option<Tensor<1>>,
) -> Tensor<1> {
    let [_, labels] = logits.dims();
    let logits = logits.cast(DType::F32);
    let targets = targets.cast(DType::F32);
    let mut positive = targets.clone() * softplus(-logits.clone());
    if let Some(weights) = positive_weights {
        positive = positive * weights.cast(DType::F32).reshape([1, labels]);
    }
    let terms = positive + (targets.neg() + 1.0) * softplus(logits);
    terms.sum() / labels as f32
}

/// Squared error of outputs and targets `[samples, targets]`, the mean over targets as in PyTorch's
/// `MSELoss`.
pub fn regression(outputs: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    let [_, count] = outputs.dims();
    let difference = outputs.cast(DType::F32) - targets.cast(DType::F32);
    difference.clone().mul(difference).sum() / count as f32
}

/// `Σ −log softmax(logits)[target]` over the rows whose target is not −100.
pub(crate) fn token_cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [tokens, _] = logits.dims();
    let ignored = targets
        .clone()
        .equal_elem(calor_kernels::IGNORED_TARGET as i32);
    let targets = targets.mask_fill(ignored.clone(), 0);
    log_softmax(logits, 1)
        .gather(1, targets.reshape([tokens, 1]))
        .reshape([tokens])
        .mask_fill(ignored, 0.0)
        .sum()
        .neg()
}

/// `log(1 + eˣ)` without overflow: `max(x, 0) + log(1 + e^−|x|)`.
fn softplus<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone().clamp_min(0.0) + x.abs().neg().exp().log1p()
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    // Expected values: torch 2.11's functions with reduction="sum" (for multilabel and regression
    // the sum over samples of the mean over columns), of the same f32 numbers.
    const LOGITS: [[f32; 3]; 3] = [[0.5, -1.25, 3.0], [-40.0, 2.0, 0.0], [90.0, -0.75, 0.1]];

    fn tensor<const D: usize>(data: impl Into<TensorData>) -> Tensor<D> {
        Tensor::from_data(data, &Device::flex())
    }

    fn check(loss: Tensor<1>, expected: f64) {
        let ours = f64::from(loss.into_scalar::<f32>());
        assert!(
            (ours - expected).abs() <= 1e-6 * expected.abs(),
            "{ours} {expected}"
        );
    }

    #[test]
    fn binary_is_bce_with_logits() {
        let logits = || tensor::<2>([[0.5f32], [-1.25], [-90.0], [90.0]]);
        let targets = || tensor::<1>([1f32, 0.0, 1.0, 1.0]);
        check(binary(logits(), targets(), None), 90.726_005_554_199_22);
        check(
            binary(logits(), targets(), Some([0.5, 3.0])),
            271.5481872558594,
        );
    }

    #[test]
    fn multiclass_is_cross_entropy() {
        let targets = || Tensor::<1, Int>::from_ints([2, 0, 1], &Device::flex());
        check(
            multiclass(tensor(LOGITS), targets(), None),
            132.96890258789062,
        );
        let weights = tensor::<1>([2f32, 0.25, 1.0]);
        check(
            multiclass(tensor(LOGITS), targets(), Some(weights)),
            107.03334045410156,
        );
    }

    #[test]
    fn multilabel_is_the_mean_over_labels() {
        let targets = || tensor::<2>([[1f32, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]);
        check(
            multilabel(tensor(LOGITS), targets(), None),
            1.8253121376037598,
        );
        let weights = tensor::<1>([2f32, 0.5, 1.0]);
        check(
            multilabel(tensor(LOGITS), targets(), Some(weights)),
            1.7938592433929443,
        );
    }

    #[test]
    fn regression_is_the_mean_over_targets() {
        let targets = tensor::<2>([[1f32, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]);
        check(regression(tensor(LOGITS), targets), 3178.294921875);
    }

    #[test]
    fn ignored_tokens_count_for_nothing() {
        let targets = Tensor::<1, Int>::from_ints([2, -100, 1], &Device::flex());
        check(
            token_cross_entropy(tensor(LOGITS), targets),
            90.84198760986328,
        );
    }
}
