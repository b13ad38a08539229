#!/usr/bin/env python3
"""Writes crates/evaluate/tests/fixtures/metrics.json: predictions and what scikit-learn and numpy
make of them, for the tests of calor-evaluate.

    python scripts/references/metrics.py crates/evaluate/tests/fixtures/metrics.json

Each task holds its predictions, the metrics on all rows (`metrics`), and the metrics where row i
occurs weights[i] times (`weighted`), as a bootstrap resample sees them. Needs numpy and
scikit-learn. Deterministic: the same versions write the same file.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import sklearn
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    log_loss,
    precision_recall_curve,
    r2_score,
    roc_auc_score,
    roc_curve,
    root_mean_squared_error,
)

BINS = 15


def calibration_error(probabilities, happened):
    """Mean over rows of |mean probability - observed rate| of their bin, 15 bins of equal width,
    each (low, high] and the first with its lower end."""
    edges = np.linspace(0.0, 1.0, BINS + 1)
    bins = np.digitize(probabilities, edges[1:-1], right=True)
    error = 0.0
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            gap = probabilities[inside].mean() - happened[inside].mean()
            error += inside.mean() * abs(gap)
    return error


def binary_metrics(probabilities, targets):
    predicted = probabilities >= 0.5
    return {
        "auroc": roc_auc_score(targets, probabilities),
        "auprc": average_precision_score(targets, probabilities),
        "brier": brier_score_loss(targets, probabilities),
        "ece": calibration_error(probabilities, targets.astype(float)),
        "log_loss": log_loss(targets, probabilities),
        "accuracy": accuracy_score(targets, predicted),
        "macro_f1": f1_score(targets, predicted, average="macro"),
    }


def multiclass_metrics(probabilities, targets):
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    return {
        "auroc": roc_auc_score(targets, probabilities, multi_class="ovr", average="macro"),
        "log_loss": log_loss(targets, probabilities, labels=list(range(classes))),
        "ece": calibration_error(probabilities.max(axis=1), (predicted == targets).astype(float)),
        "accuracy": accuracy_score(targets, predicted),
        "macro_f1": f1_score(targets, predicted, average="macro"),
    }


def multilabel_metrics(probabilities, targets):
    predicted = probabilities >= 0.5
    labels = range(targets.shape[1])
    return {
        "auroc": roc_auc_score(targets, probabilities, average="macro"),
        "auroc_micro": roc_auc_score(targets, probabilities, average="micro"),
        "auprc": average_precision_score(targets, probabilities, average="macro"),
        "auprc_micro": average_precision_score(targets, probabilities, average="micro"),
        "brier": np.mean([brier_score_loss(targets[:, k], probabilities[:, k]) for k in labels]),
        "ece": calibration_error(probabilities.ravel(), targets.ravel().astype(float)),
        "log_loss": np.mean([log_loss(targets[:, k], probabilities[:, k]) for k in labels]),
        "accuracy": accuracy_score(targets, predicted),
        "macro_f1": f1_score(targets, predicted, average="macro"),
        "micro_f1": f1_score(targets, predicted, average="micro"),
    }


def regression_metrics(predicted, targets):
    return {
        "rmse": root_mean_squared_error(targets, predicted),
        "r2": r2_score(targets, predicted),
    }


def resample(generator, rows):
    return np.bincount(generator.integers(0, rows, rows), minlength=rows)


def task(generator, measure, predictions, targets):
    weights = resample(generator, len(targets))
    plain = measure(predictions, targets)
    weighted = measure(np.repeat(predictions, weights, axis=0), np.repeat(targets, weights, axis=0))
    return {
        "predictions": predictions.ravel().tolist(),
        "targets": targets.ravel().tolist(),
        "weights": weights.tolist(),
        "metrics": {name: float(value) for name, value in plain.items()},
        "weighted": {name: float(value) for name, value in weighted.items()},
    }


def binary(generator):
    rows = 240
    # Two decimals make ties; 0 and 1 are among them.
    probabilities = np.round(generator.beta(0.7, 1.3, rows), 2)
    probabilities[:2] = [0.0, 1.0]
    targets = (generator.random(rows) < 0.2 + 0.6 * probabilities).astype(int)
    reference = task(generator, binary_metrics, probabilities, targets)
    false_rates, true_rates, _ = roc_curve(targets, probabilities, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(targets, probabilities)
    reference["roc"] = list(zip(false_rates.tolist(), true_rates.tolist()))
    # scikit-learn goes from the lowest threshold up and adds the point (0, 1) at the end.
    reference["precision_recall"] = list(
        zip(recall[-2::-1].tolist(), precision[-2::-1].tolist())
    )
    for name, strategy, bins in [
        ("calibration", "uniform", BINS),
        ("calibration_by_quantile", "quantile", 10),
    ]:
        observed, predicted = calibration_curve(
            targets, probabilities, n_bins=bins, strategy=strategy
        )
        reference[name] = list(zip(predicted.tolist(), observed.tolist()))
    return reference


def multiclass(generator):
    rows, classes = 160, 4
    # A class of its own, with a weight that makes one class rare.
    targets = generator.choice(classes, rows, p=[0.4, 0.3, 0.2, 0.1])
    logits = generator.normal(0.0, 1.0, (rows, classes))
    logits[np.arange(rows), targets] += 1.0
    exponentials = np.exp(logits)
    probabilities = np.round(exponentials / exponentials.sum(axis=1, keepdims=True), 3)
    probabilities[:, -1] = 1.0 - probabilities[:, :-1].sum(axis=1)
    reference = task(generator, multiclass_metrics, np.abs(probabilities), targets)
    reference["classes"] = classes
    return reference


def multilabel(generator):
    rows, labels = 120, 3
    probabilities = np.round(generator.random((rows, labels)), 3)
    rates = 0.1 + np.array([0.7, 0.5, 0.3]) * probabilities
    targets = (generator.random((rows, labels)) < rates).astype(int)
    reference = task(generator, multilabel_metrics, probabilities, targets)
    reference["labels"] = labels
    return reference


def regression(generator):
    rows = 100
    targets = np.round(generator.normal(120.0, 15.0, rows), 1)
    predicted = np.round(targets + generator.normal(1.0, 8.0, rows), 2)
    return task(generator, regression_metrics, predicted, targets)


def percentiles(generator):
    values = np.round(np.sort(generator.random(37)), 4)
    shares = [0.0, 0.025, 0.1, 0.5, 0.975, 1.0]
    return {
        "values": values.tolist(),
        "shares": shares,
        "percentiles": np.quantile(values, shares).tolist(),
    }


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: scripts/references/metrics.py FILE")
    generator = np.random.default_rng(20261)
    reference = {
        "made_by": "scripts/references/metrics.py",
        "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__},
        "binary": binary(generator),
        "multiclass": multiclass(generator),
        "multilabel": multilabel(generator),
        "regression": regression(generator),
        "percentile": percentiles(generator),
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(reference, file, allow_nan=False, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
