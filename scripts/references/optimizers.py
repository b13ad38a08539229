#!/usr/bin/env python3
"""Writes crates/train/tests/fixtures/optimizers.json: trajectories of torch.optim.SGD, torch.optim.Muon,
the authors' AdamWScheduleFree, bitsandbytes' AdamW8bit and PyTorch's EMA, and bitsandbytes' 8-bit codes.

    python scripts/references/optimizers.py crates/train/tests/fixtures/optimizers.json

Needs torch (2.9 or newer, for Muon), bitsandbytes and schedulefree; runs on the CPU. Start values and
gradients are a formula that the tests repeat, so that they need not be stored.

Muon's iteration is computed in bf16 by PyTorch. It is run twice: as it is, and with that cast left out.

bitsandbytes finds codes in three ways: on GPUs and in its plain PyTorch path the nearest one; on a CPU
through a table without room for the seven smallest values. The nearest one is what is stored.
"""

import json
import math
import sys
from contextlib import contextmanager

import bitsandbytes
import numpy
import schedulefree
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.cpu import ops as bnb_cpu

SHAPES = {"layer.lora_A.weight": [3, 5], "layer.lora_B.weight": [6, 3], "head": [4]}
STEPS = 12
# The steps, from 0, after which values are stored.
STORED = (0, 1, 5, 11)
LARGE = 5000
EVERY = 41


def formula(seed, count, spread=1):
    """Numbers from -0.5 to 0.5; with `spread`, each index a power of ten smaller, in turn."""
    values = [
        (((index * index * 577 + index * 1103 + seed * 9973) % 2003) / 2003 - 0.5) * 10.0 ** -(index % spread)
        for index in range(count)
    ]
    return torch.tensor(values, dtype=torch.float32)


def short(tensor):
    """f32 values in as few digits as tell them apart."""
    return [float(str(numpy.float32(value))) for value in tensor.detach().flatten().tolist()]


def start():
    return {
        name: torch.nn.Parameter(formula(number, math.prod(shape)).reshape(shape))
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def give_gradients(parameters, step):
    for number, parameter in enumerate(parameters.values()):
        seed = 100 + 10 * step + number
        parameter.grad = formula(seed, parameter.numel()).reshape(parameter.shape)


def shown(tensors):
    return {name: short(tensor) for name, tensor in tensors.items()}


def sgd(**options):
    parameters = start()
    optimizer = torch.optim.SGD(parameters.values(), foreach=False, fused=False, **options)
    rows = []
    for step in range(STEPS):
        give_gradients(parameters, step)
        optimizer.step()
        if step in STORED:
            rows.append(shown(parameters))
    return {**{"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}, **options, "parameters": rows}


@contextmanager
def iteration_in_f32():
    cast = torch.Tensor.bfloat16
    # A copy, as the cast is one: the iteration divides in place.
    torch.Tensor.bfloat16 = lambda tensor: tensor.clone()
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = cast


def muon(scale, nesterov):
    def run():
        parameters = start()
        factors = [tensor for name, tensor in parameters.items() if "lora" in name]
        optimizer = torch.optim.Muon(
            factors, lr=2e-2, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=scale
        )
        others = torch.optim.AdamW([parameters["head"]], lr=2e-2, weight_decay=0.1, foreach=False)
        rows = []
        for step in range(STEPS):
            give_gradients(parameters, step)
            optimizer.step()
            others.step()
            if step in STORED:
                rows.append(shown(parameters))
        return rows

    as_it_is = run()
    with iteration_in_f32():
        parameters = run()
    return {
        "scale": scale,
        "nesterov": nesterov,
        "parameters": parameters,
        "last_in_bf16": as_it_is[-1],
    }


def schedule_free(weight_decay, factors):
    parameters = start()
    optimizer = schedulefree.AdamWScheduleFree(
        parameters.values(), lr=1.0, betas=(0.9, 0.98), weight_decay=weight_decay, foreach=False
    )
    optimizer.train()
    training, evaluated = [], []
    for step, factor in enumerate(factors):
        optimizer.param_groups[0]["lr"] = 2e-2 * factor
        give_gradients(parameters, step)
        optimizer.step()
        if step not in STORED:
            continue
        training.append(shown(parameters))
        # `eval` and `train` move the parameters: on a copy, as ours leaves them alone.
        kept = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        optimizer.eval()
        evaluated.append(shown(parameters))
        optimizer.train()
        for name, tensor in parameters.items():
            tensor.data.copy_(kept[name])
    return {
        "weight_decay": weight_decay,
        "factors": factors,
        "parameters": training,
        "averages": evaluated,
    }


def ema(decay):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(start().values())

    holder = Holder()
    averaged = torch.optim.swa_utils.AveragedModel(
        holder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    rows = []
    for step in range(STEPS):
        give_gradients(dict(zip(SHAPES, holder.tensors)), step)
        optimizer.step()
        averaged.update_parameters(holder)
        if step in STORED:
            rows.append(shown(dict(zip(SHAPES, averaged.module.tensors))))
    return {"decay": decay, "averages": rows}


PLAIN = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def quantised(values, code):
    """Codes and the largest magnitude of each block, by bitsandbytes' plain PyTorch path."""
    return torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(PLAIN, values, code, 256)


def restored(codes, largest, code):
    return torch.ops.bitsandbytes.dequantize_blockwise.default.redispatch(
        PLAIN, codes, largest, code, 256, torch.float32
    )


def quantise_into(values, code, largest_out, codes_out, _):
    codes, largest = quantised(values, code)
    codes_out.copy_(codes)
    largest_out.copy_(largest)


bnb_cpu._quant_blockwise_fp32_direct = quantise_into
bnb_cpu._dequant_blockwise_fp32_direct = lambda codes, largest, code, _: restored(codes, largest, code)


def adamw_8bit():
    parameter = torch.nn.Parameter(formula(7, LARGE))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-2, weight_decay=0.1)
    rows = []
    for step in range(STEPS):
        parameter.grad = formula(100 + step, LARGE, 5)
        optimizer.step()
        if step in STORED:
            rows.append(short(parameter[::EVERY]))
    return {"parameters": rows}


def codes(signed):
    """What bitsandbytes makes of 300 numbers: its codes and what they stand for."""
    code = bnb.create_dynamic_map(signed=signed)
    values = formula(3, 300, 7)
    if not signed:
        values = values.abs()
    codes, largest = quantised(values, code)
    return {
        "map": short(code),
        "codes": codes.tolist(),
        "largest": short(largest),
        "restored": short(restored(codes, largest, code)),
    }


def main():
    fixture = {
        "torch": torch.__version__.split("+")[0],
        "bitsandbytes": bitsandbytes.__version__,
        "schedulefree": "1.4.1",
        "sgd": [
            sgd(lr=0.1),
            sgd(lr=0.1, momentum=0.9, weight_decay=0.05),
            sgd(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05),
        ],
        "muon": [muon("match_rms_adamw", True), muon("original", False)],
        "schedule_free": [
            schedule_free(0.0, [1.0] * STEPS),
            schedule_free(0.1, [min(step / 4, 1.0) for step in range(STEPS)]),
        ],
        "ema": ema(0.8),
        "adamw_8bit": adamw_8bit(),
        "signed": codes(True),
        "unsigned": codes(False),
    }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(fixture, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
