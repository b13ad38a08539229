#!/usr/bin/env python3
"""A LoRA step of calor beside the same step of PyTorch + PEFT, on this machine.

usage: python benches/peer_torch.py [--device cpu] [--dtype f32] [--json] [options]

Two cases: SmolLM2-135M, 2 × 256 tokens, next-token loss; and MiniLM, 32 × 128 tokens, a binary
classifier of the whole sequence. Both with LoRA of rank 16 on all linear layers, AdamW, gradients
clipped at 1, every row full (no padding on either side).

How it is kept fair: both sides start from the same adapter file and take the same batch file;
the losses of the first steps are compared first, and nothing is timed when they differ; each run
is a process of its own with all cores, so its peak memory is its own; runs go A B B A, so that a
machine that warms up or slows down does so for both; the median step counts. PyTorch runs as
PEFT's users run it at its best without compiling: scaled-dot-product attention, fused AdamW,
gradients set to none, no mask where nothing is padded, no dropout modules with work to do.

Joules are RAPL's of the whole machine where they can be read, else processor seconds times the
stated watts of calor's meter on both sides, and then called modelled.

The Python that runs this needs torch, transformers, peft and safetensors. Checkpoints are
brought by scripts/checkpoints when they are missing. Calor is built beforehand:
cargo build --release.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
REFERENCES = ROOT / "scripts" / "references"
LEARNING_RATE = 2e-4
WATTS_PER_BUSY_CORE = 10.0
"""The default of calor's [energy] section; checked against what calor reports."""
LOSS_TOLERANCE = 1e-3
CHECKED_STEPS = 3


@dataclass(frozen=True)
class Case:
    model: str
    checkpoint: str
    script: str
    task: str
    batch: int
    seq: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq


CASES = [
    Case("SmolLM2-135M", "SmolLM2-135M-Instruct", "smollm2", "causal_lm", 2, 256),
    Case("MiniLM", "all-MiniLM-L6-v2", "minilm", "sequence_classification", 32, 128),
]


class BenchError(Exception):
    """Something a person has to know: what went wrong and what to do about it."""


def main() -> None:
    options = parse()
    if options.side:
        torch_side(options)
        return
    rows = []
    for case in CASES:
        if options.only and case.model not in options.only:
            continue
        rows.append(compare(case, options))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--dtype", choices=["f32"], default="f32")
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout")
    parser.add_argument(
        "--calor", type=Path, default=TARGET / "release" / "calor", metavar="BINARY"
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=ROOT / "models",
        metavar="DIR",
        help="folder that holds or gets the checkpoints (default: models)",
    )
    parser.add_argument("--only", nargs="+", choices=[case.model for case in CASES])
    parser.add_argument("--steps", type=int, default=8, help="timed steps a run (default 8)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--rounds", type=int, default=1, help="times A B B A is run (default 1)")
    parser.add_argument("--torch-only", action="store_true", help="PyTorch's side alone, no ratio")
    # How this script calls itself, for PyTorch's side in a process of its own.
    for name in ("--side", "--model", "--task", "--adapter", "--data"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--side-device", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--side-dtype", choices=["f32", "bf16"], default="f32", help=argparse.SUPPRESS)
    for name in ("--checkpointing", "--compile", "--adapter-in-dtype"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 0 or options.rounds < 1:
        parser.error("--steps and --rounds take at least 1, --warmup at least 0")
    return options


def compare(case: Case, options: argparse.Namespace) -> dict:
    """One row: losses first, then the timed runs."""
    folder = checkpoint(case, options.models)
    work = prepare(case, folder)
    calor = options.calor
    if not options.torch_only and not calor.is_file():
        raise BenchError(f"{calor} is not there: `cargo build --release`, or name it with --calor")
    sides = {
        "calor": lambda steps, warmup: run_calor(case, folder, work, calor, steps, warmup),
        "pytorch": lambda steps, warmup: run_torch(case, folder, work, steps, warmup),
    }
    order = ["calor", "pytorch", "pytorch", "calor"]
    if options.torch_only:
        del sides["calor"]
        order = ["pytorch", "pytorch"]
    row = {
        "model": case.model,
        "task": case.task,
        "batch": case.batch,
        "seq": case.seq,
        "device": options.device,
        "dtype": options.dtype,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
    }
    if not options.torch_only:
        row["loss_relative_difference"] = check_losses(case, sides)
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for turn in order * options.rounds:
        say(f"{case.model}: {turn}, {options.warmup} + {options.steps} steps")
        runs[turn].append(sides[turn](options.steps, options.warmup))
    for name in sides:
        row.update({f"{name}_{key}": value for key, value in summary(case, runs[name]).items()})
    if not options.torch_only:
        sources = {row["calor_energy_status"], row["pytorch_energy_status"]}
        if len(sources) != 1:
            both = " and ".join(sorted(sources))
            raise BenchError(f"{case.model}: the joules of the two sides are {both}: not comparable")
        row["ratio"] = row["calor_tokens_per_s"] / row["pytorch_tokens_per_s"]
        row["memory_ratio"] = row["calor_peak_memory_bytes"] / row["pytorch_peak_memory_bytes"]
        row["energy_ratio"] = row["calor_energy_j_per_token"] / row["pytorch_energy_j_per_token"]
    return row


def checkpoint(case: Case, models: Path) -> Path:
    folder = models / case.checkpoint
    if not (folder / "model.safetensors").is_file():
        script = ROOT / "scripts" / "checkpoints" / case.script
        if subprocess.run([script, "--out", folder], stdout=sys.stderr).returncode != 0:
            raise BenchError(f"{script.name} could not bring {case.model} (see above)")
    return folder


def prepare(case: Case, folder: Path) -> Path:
    """The initial adapter and the batch, the same on every machine."""
    work = TARGET / "bench" / "peer_torch" / case.script
    command = [sys.executable, REFERENCES / "peft_steps.py", folder, "--task", case.task]
    command += ["--out", work, "--batch", str(case.batch), "--seq", str(case.seq)]
    command += ["--full", "--prepare-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(
            f"cannot prepare the batch of {case.model}: {last_line(done.stderr)}\n"
            f"{sys.executable} needs torch, transformers, peft and safetensors"
        )
    return work


def check_losses(case: Case, sides: dict) -> float:
    """The largest relative difference of the first steps' losses; an error above the tolerance."""
    say(f"{case.model}: comparing the losses of {CHECKED_STEPS} steps")
    ours = sides["calor"](CHECKED_STEPS, 0)["losses"]
    theirs = sides["pytorch"](CHECKED_STEPS, 0)["losses"]
    if len(ours) != CHECKED_STEPS or len(theirs) != CHECKED_STEPS:
        raise BenchError(f"{case.model}: {len(ours)} and {len(theirs)} losses, {CHECKED_STEPS} wanted")
    difference = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    if not difference <= LOSS_TOLERANCE:
        raise BenchError(
            f"{case.model}: the losses differ by {difference:.2g} (calor {ours}, PyTorch {theirs}): "
            "not timed, because the two sides do not compute the same thing"
        )
    return difference


def run_calor(case: Case, folder: Path, work: Path, calor: Path, steps: int, warmup: int) -> dict:
    command = [calor, "bench", "step", "--model", folder, "--task", case.task]
    command += ["--adapter", work / "initial", "--data", work / "batch.safetensors"]
    command += ["--steps", str(steps), "--warmup", str(warmup)]
    command += ["--learning-rate", str(LEARNING_RATE), "--device", "cpu", "--json"]
    return run_side(f"{case.model}: calor", command)


def run_torch(case: Case, folder: Path, work: Path, steps: int, warmup: int) -> dict:
    command = [sys.executable, Path(__file__).resolve(), "--side", "torch", "--model", folder]
    command += ["--task", case.task, "--adapter", work / "initial"]
    command += ["--data", work / "batch.safetensors", "--steps", str(steps), "--warmup", str(warmup)]
    return run_side(f"{case.model}: PyTorch", command)


def run_side(name: str, command: list, on_gpu: bool = False, timeout_s: float | None = None) -> dict:
    """What a side prints as JSON, with the peak resident memory of its process as the kernel counts it."""
    cores = str(len(os.sched_getaffinity(0)))
    threads = {"OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores, "RAYON_NUM_THREADS": cores}
    with tempfile.TemporaryFile("w+") as diagnostics:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=diagnostics,
            text=True,
            env={**os.environ, **threads} | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        )
        limit = threading.Timer(timeout_s, process.kill) if timeout_s else None
        if limit:
            limit.start()
        with process.stdout as stream:
            output = stream.read()
        if limit:
            limit.cancel()
        # Not `wait`: only wait4 tells what this one child used.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        diagnostics.seek(0)
        errors = diagnostics.read()
    if process.returncode != 0:
        raise BenchError(f"{name} failed with status {process.returncode}: {last_line(errors)}")
    try:
        result = json.loads(output)
    except json.JSONDecodeError as error:
        raise BenchError(f"{name} printed no JSON: {error}") from error
    # ru_maxrss is in KiB on Linux and equals VmHWM at the process's end.
    result["peak_memory_bytes"] = usage.ru_maxrss * 1024
    return result


def summary(case: Case, runs: list[dict]) -> dict:
    steps_s = [seconds for run in runs for seconds in run["step_s"]]
    timed_tokens = case.tokens * len(steps_s)
    found = {
        "step_s": statistics.median(steps_s),
        "step_s_shortest": min(steps_s),
        "step_s_longest": max(steps_s),
        "tokens_per_s": case.tokens / statistics.median(steps_s),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
    }
    energies = [energy_of(run) for run in runs]
    statuses = {status for _, status, _ in energies}
    if len(statuses) != 1:
        raise BenchError(f"{case.model}: the source of joules changed between runs: {statuses}")
    energy_j = sum(energy for energy, _, _ in energies)
    found["energy_j"] = energy_j / len(steps_s)
    found["energy_j_per_token"] = energy_j / timed_tokens
    found["energy_status"] = energies[0][1]
    found["energy_source"] = energies[0][2]
    return found


def energy_of(run: dict) -> tuple[float, str, str]:
    """Joules of a run's timed steps, `measured` or `modelled`, and from what."""
    energy = run["energy_j"]
    if energy["status"] == "unavailable":
        raise BenchError(f"no joules: {energy['reason']}")
    watts = energy.get("inputs", {}).get("watts_per_busy_core", WATTS_PER_BUSY_CORE)
    if watts != WATTS_PER_BUSY_CORE:
        raise BenchError(f"calor models {watts} W a busy core, this script {WATTS_PER_BUSY_CORE} W")
    return energy["value"], energy["status"], energy["source"]


def torch_side(options: argparse.Namespace) -> None:
    """PyTorch's steps in this process; prints what `calor bench step --json` prints."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(REFERENCES))
    import peft_steps
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    on_gpu = options.side_device != "cpu"
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.side_dtype]
    settings = peft_steps.Settings(
        steps=options.warmup + options.steps, learning_rate=LEARNING_RATE
    )
    base = peft_steps.load_base(Path(options.model), options.task, attention="sdpa", dtype=dtype)
    base.config.use_cache = False
    model = peft_steps.load_trainable(
        base, Path(options.adapter), autocast_adapter_dtype=not options.adapter_in_dtype
    )
    model = model.to(options.side_device).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = peft_steps.optimizer_for(model, settings, fused=True)
    if options.compile:
        model = torch.compile(model)
    batch = load_file(options.data)
    if not bool(batch.pop("attention_mask", torch.ones(1)).all()):
        raise BenchError("the batch has padding: this bench compares full rows")
    batch = {name: tensor.to(options.side_device) for name, tensor in batch.items()}
    energy = GpuEnergy(options.side_device) if on_gpu else Energy()
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


def print_table(rows: list[dict]) -> None:
    """For people: one line a side, the ratios below."""
    for row in rows:
        shape = f"{row['batch']} × {row['seq']} tokens"
        print(f"{row['model']}, {shape}, {row['task']}, {row['device']} {row['dtype']}, {row['cores']} cores")
        print(f"  {'':8} {'tokens/s':>9} {'s/step':>8} {'J/step':>8} {'mJ/token':>9} {'peak MiB':>9}")
        for side in ("calor", "pytorch"):
            if f"{side}_tokens_per_s" not in row:
                continue
            print(
                f"  {side:8} {row[f'{side}_tokens_per_s']:9.1f} {row[f'{side}_step_s']:8.3f} "
                f"{row[f'{side}_energy_j']:8.2f} {1e3 * row[f'{side}_energy_j_per_token']:9.2f} "
                f"{row[f'{side}_peak_memory_bytes'] / 2**20:9.0f}"
            )
        if "ratio" in row:
            print(
                f"  calor / PyTorch: speed {row['ratio']:.2f}×, memory {row['memory_ratio']:.2f}×, "
                f"joules {row['energy_ratio']:.2f}×; losses within {row['loss_relative_difference']:.1e}"
            )
        print(f"  joules {row['pytorch_energy_status']}: {row['pytorch_energy_source']}")


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        sys.exit(f"peer_torch: {error}")
