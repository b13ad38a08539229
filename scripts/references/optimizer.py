#!/usr/bin/env python3
"""Writes crates/train/tests/fixtures/optimizer.json: what PyTorch's AdamW and
clip_grad_norm_ and Transformers' schedules give, for the tests of calor-train.

    python scripts/references/optimizer.py crates/train/tests/fixtures/optimizer.json

Needs torch and transformers. Deterministic: the same versions write the same file.
The other optimizers have optimizers.py.
"""

import json
import sys

import torch
import transformers

SHAPES = {"adapter.a": [2, 3], "adapter.b": [3, 2], "head": [4]}


def draw(generator, scale=1.0):
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32) * scale
        for name, shape in SHAPES.items()
    }


def values(tensors):
    return {name: tensor.detach().flatten().tolist() for name, tensor in tensors.items()}


def adamw(name, steps, options, head_learning_rate, max_norm, scale):
    """Runs `steps` updates and records parameters, gradients, norms and moments."""
    generator = torch.Generator().manual_seed(7)
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in draw(generator).items()}
    start = values(parameters)
    adapter = [tensor for key, tensor in parameters.items() if key != "head"]
    optimizer = torch.optim.AdamW(
        [
            {"params": adapter},
            {"params": [parameters["head"]], "lr": head_learning_rate},
        ],
        **options,
        foreach=False,
        fused=False,
    )
    rows = []
    for _ in range(steps):
        gradients = draw(generator, scale)
        for key, parameter in parameters.items():
            parameter.grad = gradients[key].clone()
        norm = None
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm, foreach=False).item()
        clipped = {key: parameter.grad.clone() for key, parameter in parameters.items()}
        optimizer.step()
        rows.append(
            {
                "gradients": values(gradients),
                "norm": norm,
                "clipped": values(clipped),
                "parameters": values(parameters),
                "exp_avg": values({k: optimizer.state[p]["exp_avg"] for k, p in parameters.items()}),
                "exp_avg_sq": values({k: optimizer.state[p]["exp_avg_sq"] for k, p in parameters.items()}),
            }
        )
    group = optimizer.param_groups[0]
    return {
        "name": name,
        "learning_rate": group["lr"],
        "head_learning_rate": head_learning_rate,
        "beta_1": group["betas"][0],
        "beta_2": group["betas"][1],
        "epsilon": group["eps"],
        "weight_decay": group["weight_decay"],
        "max_norm": max_norm,
        "start": start,
        "steps": rows,
    }


def schedule(kind, warmup_steps, total_steps, decay_steps=0, decay_shape="linear", minimum=0.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "constant":
        scheduler = transformers.get_constant_schedule_with_warmup(optimizer, warmup_steps)
    elif kind == "linear":
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    elif kind == "cosine":
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    else:
        scheduler = transformers.get_wsd_schedule(
            optimizer,
            warmup_steps,
            decay_steps,
            total_steps,
            decay_type="1-sqrt" if decay_shape == "one_minus_sqrt" else decay_shape,
            min_lr_ratio=minimum,
        )
    factor = scheduler.lr_lambdas[0]
    return {
        "kind": kind,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
        "decay_steps": decay_steps,
        "decay_shape": decay_shape,
        "minimum": minimum,
        "factors": [factor(step) for step in range(total_steps + 3)],
    }


def main():
    out = sys.argv[1]
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    fixture = {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "defaults": {
            "beta_1": plain["betas"][0],
            "beta_2": plain["betas"][1],
            "epsilon": plain["eps"],
            "weight_decay": plain["weight_decay"],
        },
        "adamw": [
            adamw("defaults", 6, {}, 1e-3, None, 1.0),
            adamw("head with its own rate, clipped", 8, {"lr": 2e-2, "weight_decay": 0.1}, 5e-2, 1.0, 3.0),
            adamw("too small to clip", 4, {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6}, 1e-2, 100.0, 0.1),
        ],
        "schedules": [
            schedule(kind, warmup, total)
            for kind in ("constant", "linear", "cosine")
            for warmup, total in ((0, 7), (3, 20), (1, 1), (5, 4))
        ]
        + [
            schedule("wsd", 3, 20, decay, shape)
            for decay, shape in ((0, "linear"), (6, "linear"), (6, "cosine"), (6, "one_minus_sqrt"), (17, "linear"))
        ]
        # Its warm-up would start at the minimum: without one.
        + [schedule("wsd", 0, 12, 5, "cosine", 0.1)],
    }
    with open(out, "w", encoding="utf-8") as file:
        json.dump(fixture, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
