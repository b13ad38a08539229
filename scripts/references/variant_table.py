#!/usr/bin/env python3
"""Every adapter variant on every architecture: how far Calor is from Transformers and PEFT.

usage: scripts/references/variant_table.py --calor target/release/calor [--only ARCHITECTURE …]
           [--device cpu] [--json]

The models are the tiny ones of models.py, with random weights. PEFT makes each variant's adapter, every
trained tensor is moved off its start by a little noise, and Calor loads what PEFT saved. Compared in f32:
the outputs (logits and next-token loss of decoders, last states of encoders) and the gradient of every
trained tensor. A cell is the largest difference of any number, over the largest magnitude in its tensor.

Prints a Markdown table; exit status 1 where one is above its tolerance or something failed. Needs torch,
transformers, peft and safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from zlib import crc32

import torch
import transformers
from models import VOCAB, save_adapter
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

ARCHITECTURES = {
    # fixture → module name of the token embedding
    "llama3": "embed_tokens",
    "mistral": "embed_tokens",
    "qwen2": "embed_tokens",
    "qwen3": "embed_tokens",
    "olmo2": "embed_tokens",
    "phi3": "embed_tokens",
    "gemma2": "embed_tokens",
    "gemma3": "embed_tokens",
    "gpt2": "wte",
    "gpt-neox": "embed_in",
    "bert": "word_embeddings",
    "roberta": "word_embeddings",
    "electra": "word_embeddings",
    "modernbert": "tok_embeddings",
    "deberta": "word_embeddings",
}
TOKENS = [7, 40, 11]
"""Trained tokens; the batch holds each of them."""

VARIANTS = {
    "LoRA": lambda embedding: {},
    "rsLoRA": lambda embedding: {"use_rslora": True},
    "DoRA": lambda embedding: {"use_dora": True},
    "PiSSA": lambda embedding: {"init_lora_weights": "pissa"},
    "PiSSA + DoRA": lambda embedding: {"init_lora_weights": "pissa", "use_dora": True},
    "embedding": lambda embedding: {"also": embedding},
    "tokens": lambda embedding: {"trainable_token_indices": TOKENS},
    "layers": lambda embedding: {"layers_to_transform": [1]},
    "bias all": lambda embedding: {"bias": "all"},
    "bias of LoRA": lambda embedding: {"bias": "lora_only"},
}
"""What LoraConfig is given beside rank 4, alpha 8 and all linear layers."""
TOLERANCE = 1e-4
PISSA_TOLERANCE = 2e-3
"""The start is not in the file: both sides take the weight apart, PEFT in f32, and their rounding is magnified
by the gap between singular values."""
UNFOUND = {("modernbert", "layers")}
"""PEFT looks for layers behind a prefix, which AutoModel's names of ModernBERT do not have."""


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True)
    table: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, embedding in ARCHITECTURES.items():
            if options.only and name not in options.only:
                continue
            table[name] = {}
            for variant, settings in VARIANTS.items():
                folder = Path(work) / f"{name}-{variant}".replace(" ", "-")
                try:
                    reference(options.models / name, folder, name, settings(embedding))
                    table[name][variant] = compare(options, options.models / name, folder)
                except (ValueError, RuntimeError, AssertionError) as error:
                    table[name][variant] = {"error": str(error)}
                print(f"{name}, {variant}: {table[name][variant]}", file=sys.stderr, flush=True)
    print(json.dumps(table, indent=1) if options.json else markdown(table))
    bad = [
        (name, variant)
        for name, row in table.items()
        for variant, cell in row.items()
        if (name, variant) not in UNFOUND
        and not cell.get("max_rel", 1.0) <= (PISSA_TOLERANCE if "PiSSA" in variant else TOLERANCE)
    ]
    if bad:
        sys.exit(f"variant_table: beyond the tolerance: {', '.join(' '.join(pair) for pair in bad)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--calor", type=Path, default=root / "target/release/calor", metavar="BINARY")
    parser.add_argument("--models", type=Path, default=root / "crates/model/tests/fixtures")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="ARCHITECTURE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def reference(base: Path, folder: Path, name: str, settings: dict) -> None:
    """An adapter of PEFT's in `folder`, and beside it what the model with it computes."""
    seed = crc32(folder.name.encode())
    torch.manual_seed(seed)
    encoder = name in ("bert", "roberta", "electra", "modernbert", "deberta")
    kind = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    targets = linear_layers(model) + ([settings.pop("also")] if "also" in settings else [])
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION" if encoder else "CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=targets,
        **settings,
    )
    adapted = get_peft_model(model, config).eval()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            size = parameter.abs().mean().item() or 0.1
            parameter.add_(torch.randn_like(parameter) * 0.3 * size)
    save_adapter(adapted, folder, str(base))

    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    ids[0, 2 : 2 + len(TOKENS)] = torch.tensor(TOKENS)
    found = {"input_ids": ids}
    if encoder:
        states = adapted(input_ids=ids).last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
        found |= {"last_hidden_state": states.detach(), "hidden_weights": weights}
        (states * weights).sum().backward()
    else:
        result = adapted(input_ids=ids, labels=ids, use_cache=False)
        found |= {"logits": result.logits.detach(), "loss": result.loss.detach().reshape(1)}
        result.loss.backward()
    found |= {f"grad.{name}": gradient for name, gradient in gradients(adapted, trained).items()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / "reference.safetensors")


def gradients(adapted, trained: dict) -> dict:
    """The gradients under the names that PEFT saves the tensors by: saved once with them in place."""
    kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    found = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(adapted).items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(kept[name])
    # What is saved whole (an embedding beside its pair) is not trained. And a gradient that is zero but
    # for rounding (a key's bias, which softmax does not see; a pooler's, which nothing reads) says nothing.
    largest = max(tensor.abs().max() for tensor in found.values())
    return {
        name: tensor
        for name, tensor in found.items()
        if any(part in name for part in ("lora_", "bias", "trainable")) and tensor.abs().max() > 1e-6 * largest
    }


def linear_layers(model) -> list[str]:
    """The last parts of the names of a block's linear layers, as all-linear means them: no head, no pooler."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and any(part.isdigit() for part in name.split("."))
    }
    last = {name.split(".")[-1] for name in names}
    # `dense` alone would take the pooler's as well.
    return sorted(last - {"dense"}) + sorted({".".join(n.split(".")[-2:]) for n in names if n.endswith(".dense")})


def compare(options: argparse.Namespace, base: Path, folder: Path) -> dict:
    command = [options.calor, "parity", base, "--adapter", folder, "--device", options.device]
    command += ["--reference", folder / "reference.safetensors", "--json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if not done.stdout:
        raise ValueError(done.stderr.strip())
    tensors = json.loads(done.stdout)["tensors"]
    worst = max(tensors, key=lambda tensor: tensor["max_rel"])
    return {"max_rel": worst["max_rel"], "worst": worst["name"], "tensors": len(tensors)}


def markdown(table: dict) -> str:
    lines = ["| | " + " | ".join(VARIANTS) + " |", "| --- |" + " --- |" * len(VARIANTS)]
    for name, row in table.items():
        cells = [f"{row[variant]['max_rel']:.0e}" if "max_rel" in row[variant] else "–" for variant in VARIANTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
