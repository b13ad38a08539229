#!/usr/bin/env python3
"""Peak memory of a training step as predicted beside what the process held, for every architecture.

usage: scripts/references/memory_table.py --calor target/release/calor [--device cpu] [--only …] [--json]

Each model has the options of the tiny one that models.py makes, is 384 wide and 8 blocks deep, and has random
weights. A step is 4 rows of 512 tokens, LoRA of rank 16 on all linear layers, AdamW. On the CPU, what the
process held is the kernel's count (VmHWM) less that of the same program with the tiny model, which is
nearly all program; on a device it is what the allocator reserved. Prints a Markdown table. Needs torch and
transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers

DECODERS = ["llama3", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma2", "gemma3", "gpt2", "gpt-neox"]
ENCODERS = ["bert", "roberta", "electra", "modernbert", "deberta"]
SEQ = 512
SIZES = {
    "hidden_size": 384,
    "n_embd": 384,
    "pooler_hidden_size": 384,
    "embedding_size": 128,
    "intermediate_size": 1024,
    "n_inner": 1024,
    "num_hidden_layers": 8,
    "n_layer": 8,
    "num_attention_heads": 6,
    "n_head": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8000,
    "max_position_embeddings": SEQ + 8,
    "n_positions": SEQ + 8,
    "max_relative_positions": 128,
    "position_buckets": 64,
    "sliding_window": 128,
    "local_attention": 128,
}
VARIANTS = {
    "f32": ["--dtype", "f32"],
    "bf16": ["--dtype", "bf16"],
    "bf16, recomputed": ["--dtype", "bf16", "--recompute", "all"],
    "nf4, recomputed": ["--dtype", "bf16", "--quantization", "nf4", "--recompute", "all"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--calor", type=Path, default=root / "target/release/calor", metavar="BINARY")
    parser.add_argument("--fixtures", type=Path, default=root / "crates/model/tests/fixtures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=DECODERS + ENCODERS, metavar="ARCHITECTURE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    table = {}
    with tempfile.TemporaryDirectory() as work:
        for name in options.only or DECODERS + ENCODERS:
            folder = Path(work) / name
            write(options.fixtures / name, folder, name)
            tiny = step(options, options.fixtures / name, name, ["--seq", "8", "--batch", "1"])
            table[name] = {}
            for variant, flags in VARIANTS.items():
                found = step(options, folder, name, ["--seq", str(SEQ), "--batch", "4", *flags])
                on_device = found["device_peak_bytes"].get("value")
                held = on_device or found["peak_memory_bytes"]["value"] - tiny["peak_memory_bytes"]["value"]
                table[name][variant] = {"predicted": found["predicted_peak_bytes"], "held": held}
    print(json.dumps(table, indent=1) if options.json else markdown(table))


def write(fixture: Path, folder: Path, name: str) -> None:
    content = json.loads((fixture / "config.json").read_text())
    content |= {key: size for key, size in SIZES.items() if content.get(key)}
    if layers := content.get("layer_types"):
        count = content["num_hidden_layers"]
        content["layer_types"] = (layers * count)[:count]
    # Long factors are for the tiny model's head size.
    if content["model_type"] == "phi3":
        content["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = transformers.AutoConfig.for_model(**content)
    kind = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)


def step(options: argparse.Namespace, folder: Path, name: str, flags: list[str]) -> dict:
    task = "sequence_classification" if name in ENCODERS else "causal_lm"
    command = [options.calor, "bench", "step", "--model", folder, "--task", task, "--device", options.device]
    command += ["--steps", "2", "--warmup", "0", "--json", *flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"memory_table: {name}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def markdown(table: dict) -> str:
    lines = ["| | " + " | ".join(VARIANTS) + " |", "| --- |" + " --- |" * len(VARIANTS)]
    for name, row in table.items():
        cells = [
            f"{cell['predicted'] / 2**20:.0f}, {cell['held'] / 2**20:.0f} ({cell['predicted'] / cell['held'] - 1:+.0%})"
            for cell in row.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
