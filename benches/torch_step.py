#!/usr/bin/env python3
"""One LoRA step of PyTorch + PEFT again and again; prints JSON as `calor bench step --json` does.

usage: python benches/torch_step.py --model DIR --task TASK --adapter DIR --data FILE [options]

benches/peer_torch.py and scripts/gpu_bench run it beside calor, in a process of its own. Needs torch,
transformers, peft, safetensors and, on a GPU, nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

REFERENCES = Path(__file__).resolve().parents[1] / "scripts" / "references"
LEARNING_RATE = 2e-4
WATTS_PER_BUSY_CORE = 10.0
"""The default of calor's [energy] section; checked against what calor reports."""


def main() -> None:
    options = parse()
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(REFERENCES))
    import peft_steps
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    on_gpu = options.device != "cpu"
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    settings = peft_steps.Settings(
        steps=options.warmup + options.steps, learning_rate=LEARNING_RATE
    )
    base = peft_steps.load_base(Path(options.model), options.task, attention="sdpa", dtype=dtype)
    base.config.use_cache = False
    model = peft_steps.load_trainable(
        base, Path(options.adapter), autocast_adapter_dtype=not options.adapter_in_dtype
    )
    model = model.to(options.device).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = peft_steps.optimizer_for(model, settings, fused=True)
    if options.compile:
        model = torch.compile(model)
    batch = load_file(options.data)
    if bool(batch.get("attention_mask", torch.ones(1)).all()):
        # No mask where nothing is padded: attention is faster without.
        batch.pop("attention_mask", None)
    batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
    energy = GpuEnergy(options.device) if on_gpu else Energy()
    losses, step_s = [], []
    for index in range(settings.steps):
        if index == options.warmup:
            energy.start()
        started = time.perf_counter()
        # The loss and the norm are read at its end, which waits for the device.
        loss, _ = peft_steps.step(model, optimizer, batch, settings, index)
        if on_gpu:
            torch.cuda.synchronize()
        if index >= options.warmup:
            step_s.append(time.perf_counter() - started)
        losses.append(loss)
    found = {"losses": losses, "step_s": step_s, "energy_j": energy.stop()}
    if on_gpu:
        found["device_peak_bytes"] = {"value": torch.cuda.max_memory_reserved()}
        found["device_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in [
        ("--model", "folder of a checkpoint"),
        ("--task", "causal_lm or sequence_classification"),
        ("--adapter", "folder of the PEFT adapter to start from"),
        ("--data", "safetensors file with input_ids, labels and attention_mask"),
    ]:
        parser.add_argument(name, required=True, help=what)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default 8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--checkpointing", action="store_true", help="blocks run again in the backward pass")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--adapter-in-dtype", action="store_true", help="the adapter is no f32 beside half precision")
    return parser.parse_args()


class GpuEnergy:
    """Joules of the whole card between `start` and `stop`, from NVML's counter."""

    def __init__(self, device: str):
        import pynvml

        pynvml.nvmlInit()
        self.nvml = pynvml
        # As CUDA numbers them where CUDA_VISIBLE_DEVICES is not set and the order is PCI's.
        self.handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))

    def start(self) -> None:
        self.before_mj = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)

    def stop(self) -> dict:
        used_mj = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.before_mj
        return {"status": "measured", "value": used_mj * 1e-3, "source": "NVML total energy"}


class Energy:
    """Joules between `start` and `stop` by the rules of calor's meter.

    RAPL: the packages of the control type intel-rapl and the dram zones below them. Where they
    cannot be read: this process's user and system time × WATTS_PER_BUSY_CORE.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        self.zones = []
        try:
            for zone in sorted(root.glob("intel-rapl:*")):
                name = (zone / "name").read_text().strip()
                if name.startswith("package-") or name == "dram":
                    self.zones.append((name, zone, int((zone / "max_energy_range_uj").read_text())))
            self._counters()
        except (OSError, ValueError):
            self.zones = []

    def _counters(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for _, zone, _ in self.zones]

    def start(self) -> None:
        self.before_uj = self._counters()
        self.before_s = time.process_time()

    def stop(self) -> dict:
        cpu_time_s = time.process_time() - self.before_s
        if self.zones:
            # A counter that went round once comes back below where it was.
            used_uj = sum(
                after - before if after >= before else after - before + limit
                for (_, _, limit), before, after in zip(self.zones, self.before_uj, self._counters())
            )
            names = " + ".join(name for name, _, _ in self.zones)
            source = f"RAPL {names} (whole machine, powercap counters)"
            return {"status": "measured", "value": used_uj * 1e-6, "source": source}
        return {
            "status": "modelled",
            "value": cpu_time_s * WATTS_PER_BUSY_CORE,
            "source": f"model: processor time of this process × {WATTS_PER_BUSY_CORE:g} W a busy core",
            "inputs": {"cpu_time_s": cpu_time_s, "watts_per_busy_core": WATTS_PER_BUSY_CORE},
        }


if __name__ == "__main__":
    main()
