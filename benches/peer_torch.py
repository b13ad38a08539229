#!/usr/bin/env python3
"""A LoRA step of calor beside the same step of PyTorch + PEFT, on this machine.

usage: python benches/peer_torch.py [--dtype f32] [--torch-variants eager …] [--ragged HOW]
                                    [--dropout P] [--json] [options]

Two cases: SmolLM2-135M, 2 × 256 tokens, next-token loss; and MiniLM, 32 × 128 tokens, a binary
classifier of the whole sequence. Both with LoRA of rank 16 on all linear layers, AdamW and gradients
clipped at 1. PyTorch's variants, each beside what calor has for the same purpose:

  eager                   as PEFT's users run it: scaled-dot-product attention, fused AdamW, gradients
                          set to none. Beside calor's plain step.
  compile                 the same through torch.compile (on the CPU it needs a C++ compiler); it
                          compiles in the first two steps, which have to be warm-up. Beside calor's
                          plain step.
  checkpointing           eager, every block recomputed in the backward pass, not reentrant. Beside
                          calor with --recompute all.
  compile-checkpointing   both. Beside calor with --recompute all.

How it is kept fair: both sides start from the same adapter file and take the same batch file;
before anything of a case is timed, the losses of the first steps are compared for every variant, and
nothing is timed when they differ; each run is a process of its own with all cores, so its peak
memory is its own; runs go A B B A within a variant, so that a machine that warms up or slows down
does so for both; the median step counts.

Rows are full, with no padding and no mask on either side, unless --ragged says otherwise: then they
are padded to the longest, from a quarter of it on. `padded` gives both sides the same padded tensor
and mask, so both compute the same positions. `packed` lets calor put the rows one behind the other,
as its training does, while PyTorch pads, as Transformers' collators do: the same sequences, the same
losses, and what each engine makes of them. Tokens a second are those of the sequences, never padding.

Dropout is 0 unless --dropout says otherwise: then both adapters have it while they are timed. The two
engines draw different masks, so losses are compared without it.

In f32 losses may differ by 1e-3. In bf16 the frozen weights and the activations are bf16 on both sides,
adapters f32 (PEFT's autocast_adapter_dtype); then the first losses may differ by 2e-2, and after updates
calor's from those of PyTorch in f32. PyTorch's own bf16 losses may not: PEFT rounds the base's product to
bf16 before it adds the adapter's, which is smaller than that rounding after the first updates and so is
lost in part; calor adds both before it rounds. The row says how far PyTorch's are from f32. PyTorch keeps
a classifier's head in bf16, calor in f32.

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
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from torch_step import LEARNING_RATE, WATTS_PER_BUSY_CORE

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
REFERENCES = ROOT / "scripts" / "references"
LOSS_TOLERANCE = {"f32": 1e-3, "bf16": 2e-2}
"""Relative; bf16 has 8 bits of fraction."""
CHECKED_STEPS = 3
VARIANTS = {
    "eager": ([], []),
    "compile": ([], ["--compile"]),
    "checkpointing": (["--recompute", "all"], ["--checkpointing"]),
    "compile-checkpointing": (["--recompute", "all"], ["--compile", "--checkpointing"]),
}
"""What calor's and PyTorch's side are given."""


@dataclass(frozen=True)
class Case:
    model: str
    checkpoint: str
    script: str
    task: str
    batch: int
    seq: int


CASES = [
    Case("SmolLM2-135M", "SmolLM2-135M-Instruct", "smollm2", "causal_lm", 2, 256),
    Case("MiniLM", "all-MiniLM-L6-v2", "minilm", "sequence_classification", 32, 128),
]


class BenchError(Exception):
    """Something a person has to know: what went wrong and what to do about it."""


def main() -> None:
    options = parse()
    rows = []
    for case in CASES:
        if options.only and case.model not in options.only:
            continue
        rows.extend(compare(case, options))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--dtype", choices=list(LOSS_TOLERANCE), default="f32")
    parser.add_argument(
        "--torch-variants",
        nargs="+",
        choices=list(VARIANTS),
        default=["eager"],
        metavar="VARIANT",
        help="eager (default), compile, checkpointing, compile-checkpointing",
    )
    parser.add_argument(
        "--ragged",
        nargs="?",
        const="padded",
        choices=["padded", "packed"],
        help="rows of unequal lengths: padded for both (default of the option), or packed by calor",
    )
    parser.add_argument(
        "--dropout", type=float, default=0.0, metavar="P", help="of the adapter, while it is timed"
    )
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
    options = parser.parse_args()
    if options.steps < 1 or options.warmup < 0 or options.rounds < 1:
        parser.error("--steps and --rounds take at least 1, --warmup at least 0")
    if options.warmup < 2 and any("compile" in one for one in options.torch_variants):
        parser.error("torch.compile compiles in the first two steps: give --warmup at least 2")
    if not 0 <= options.dropout < 1:
        parser.error("--dropout is a share, at least 0 and below 1")
    return options


@dataclass(frozen=True)
class Work:
    """What both sides of a case are given."""

    case: Case
    folder: Path
    adapter: Path
    data: Path
    dtype: str
    pack: bool
    calor: Path


def compare(case: Case, options: argparse.Namespace) -> list[dict]:
    """A row a variant: the losses of all of them first, then the timed runs."""
    folder = checkpoint(case, options.models)
    prepared = prepare(case, folder, bool(options.ragged))
    calor = options.calor
    if not options.torch_only and not calor.is_file():
        raise BenchError(f"{calor} is not there: `cargo build --release`, or name it with --calor")
    checked = Work(
        case,
        folder,
        prepared / "initial",
        prepared / "batch.safetensors",
        options.dtype,
        options.ragged == "packed",
        calor,
    )
    differences = {}
    if not options.torch_only:
        in_f32 = None
        if options.dtype != "f32":
            in_f32 = run_torch(replace(checked, dtype="f32"), "eager", CHECKED_STEPS, 0)["losses"]
        for variant in options.torch_variants:
            differences[variant] = check_losses(checked, variant, in_f32)
    timed = replace(checked, adapter=with_dropout(checked.adapter, options.dropout))
    return [time_variant(timed, variant, differences, options) for variant in options.torch_variants]


def time_variant(
    work: Work, variant: str, differences: dict[str, dict], options: argparse.Namespace
) -> dict:
    case = work.case
    order = ["pytorch", "pytorch"] if options.torch_only else ["calor", "pytorch", "pytorch", "calor"]
    tokens, padded = tokens_of(work.data)
    row = {
        "model": case.model,
        "task": case.task,
        "variant": variant,
        "batch": case.batch,
        "seq": case.seq,
        "tokens": tokens,
        "padded_tokens": padded,
        "ragged": options.ragged,
        "dropout": options.dropout,
        "device": options.device,
        "dtype": options.dtype,
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
    }
    if variant in differences:
        row.update(differences[variant])
    runs: dict[str, list[dict]] = {name: [] for name in order}
    for turn in order * options.rounds:
        say(f"{case.model}, {variant}: {turn}, {options.warmup} + {options.steps} steps")
        runs[turn].append(SIDES[turn](work, variant, options.steps, options.warmup))
    for name, found in runs.items():
        row.update({f"{name}_{key}": value for key, value in summary(case, tokens, found).items()})
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


def prepare(case: Case, folder: Path, ragged: bool) -> Path:
    """The initial adapter and the batch, the same on every machine."""
    work = TARGET / "bench" / "peer_torch" / (f"{case.script}-ragged" if ragged else case.script)
    command = [sys.executable, REFERENCES / "peft_steps.py", folder, "--task", case.task]
    command += ["--out", work, "--batch", str(case.batch), "--seq", str(case.seq)]
    command += [*([] if ragged else ["--full"]), "--prepare-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(
            f"cannot prepare the batch of {case.model}: {last_line(done.stderr)}\n"
            f"{sys.executable} needs torch, transformers, peft and safetensors"
        )
    return work


def with_dropout(adapter: Path, dropout: float) -> Path:
    """The adapter, or a copy whose `lora_dropout` is another."""
    if dropout == 0:
        return adapter
    copy = adapter.with_name(f"{adapter.name}-dropout")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(adapter, copy)
    path = copy / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_dropout"] = dropout
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return copy


def tokens_of(data: Path) -> tuple[int, int]:
    """Tokens of the batch without and with its padding."""
    content = data.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    start, end = header["attention_mask"]["data_offsets"]
    mask = memoryview(content)[8 + length + start : 8 + length + end].cast("q")
    return sum(mask), len(mask)


def check_losses(work: Work, variant: str, in_f32: list[float] | None) -> dict:
    """Relative differences of the first steps' losses; an error above the tolerance.

    In bf16 both sides are held against `in_f32`, PyTorch's losses in f32; its own may be further away
    after an update.
    """
    model = work.case.model
    say(f"{model}, {variant}: comparing the losses of {CHECKED_STEPS} steps")
    losses = {side: run(work, variant, CHECKED_STEPS, 0)["losses"] for side, run in SIDES.items()}
    expected = in_f32 or losses["pytorch"]
    if any(len(of) != CHECKED_STEPS for of in [expected, *losses.values()]):
        raise BenchError(f"{model}: {CHECKED_STEPS} losses of each side wanted, found {losses}")
    differences = {
        side: [abs(a - b) / abs(b) for a, b in zip(of, expected)] for side, of in losses.items()
    }
    if not max(*differences["calor"], differences["pytorch"][0]) <= LOSS_TOLERANCE[work.dtype]:
        raise BenchError(
            f"{model}, {variant}: the losses differ: calor {losses['calor']}, PyTorch {losses['pytorch']}, "
            f"expected {expected}: not timed, because the two sides do not compute the same thing"
        )
    return {
        "loss_relative_difference": max(differences["calor"]),
        "pytorch_loss_relative_difference": max(differences["pytorch"]),
    }


def run_calor(work: Work, variant: str, steps: int, warmup: int) -> dict:
    command = [work.calor, "bench", "step", "--model", work.folder, "--task", work.case.task]
    command += ["--adapter", work.adapter, "--data", work.data, "--dtype", work.dtype]
    command += ["--windows", "1", "--steps", str(steps), "--warmup", str(warmup), "--profiled-steps", "0"]
    command += ["--learning-rate", str(LEARNING_RATE), "--device", "cpu", "--json"]
    command += VARIANTS[variant][0] + (["--pack"] if work.pack else [])
    return run_side(f"{work.case.model}: calor", command)


def run_torch(work: Work, variant: str, steps: int, warmup: int) -> dict:
    command = [sys.executable, Path(__file__).resolve().with_name("torch_step.py")]
    command += ["--model", work.folder, "--task", work.case.task, "--adapter", work.adapter]
    command += ["--data", work.data, "--dtype", work.dtype]
    command += ["--steps", str(steps), "--warmup", str(warmup)]
    return run_side(f"{work.case.model}: PyTorch", command + VARIANTS[variant][1])


SIDES = {"calor": run_calor, "pytorch": run_torch}


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


def summary(case: Case, tokens: int, runs: list[dict]) -> dict:
    steps_s = [seconds for run in runs for seconds in run["step_s"]]
    timed_tokens = tokens * len(steps_s)
    found = {
        "step_s": statistics.median(steps_s),
        "step_s_shortest": min(steps_s),
        "step_s_longest": max(steps_s),
        "tokens_per_s": tokens / statistics.median(steps_s),
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


def print_table(rows: list[dict]) -> None:
    """For people: one line a side, the ratios below."""
    for row in rows:
        shape = f"{row['batch']} × {row['seq']} tokens"
        if row["ragged"]:
            shape = f"{row['tokens']} of {shape}, {row['ragged']}"
        if row["dropout"]:
            shape += f", dropout {row['dropout']}"
        print(f"{row['model']}, {shape}, {row['task']}, {row['device']} {row['dtype']}, {row['cores']} cores")
        print(f"  PyTorch {row['variant']}")
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
            if row["dtype"] != "f32":
                print(f"  PyTorch's own losses are within {row['pytorch_loss_relative_difference']:.1e} of its f32's")
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
