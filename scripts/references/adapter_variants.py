#!/usr/bin/env python3
"""Ten AdamW steps of every adapter variant with PEFT, on tiny models, for the tests of crates/train.

usage: scripts/references/adapter_variants.py [--models crates/model/tests/fixtures]
           [--out crates/train/tests/fixtures/variants] [--only NAME …]

The models are those of models.py. Each variant of each family gets a folder with

  adapter_config.json, adapter_model.safetensors   the adapter before the first step, as PEFT saves it
  final.safetensors                                its tensors after the last
  steps.json                                       base, losses (each before its update), gradient norms
                                                   before clipping, and the settings of the run

and each family the one batch that every step sees, llama.safetensors and bert.safetensors: input_ids,
attention_mask [batch, seq] and labels, [batch, seq] with -100 in the padding or [batch], all int64.
Every dropout is 0. LoRA+ groups are those of PEFT's create_loraplus_optimizer but for heads, which keep
the plain rate. Needs torch, transformers, peft and safetensors; everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path
from zlib import crc32

import torch
import transformers
from models import VOCAB, save_adapter
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

STEPS = 10
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
LORA_PLUS_RATIO = 16
LORA_PLUS_EMBEDDING_RATE = 1e-4
BATCH, SEQ = 4, 12
TOKENS = [7, 40, 11]
"""Trained tokens; make_batch puts each of them into the batch."""

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "output.dense"]}
EMBEDDING = {"llama": "embed_tokens", "bert": "word_embeddings"}

# name → (options of LoraConfig, which may depend on the family, whether LoRA+ is on)
VARIANTS = {
    "lora": (lambda family: {}, False),
    "rslora": (lambda family: {"use_rslora": True}, False),
    "dora": (lambda family: {"use_dora": True, "rank_pattern": {r".*1\..*": 2}}, False),
    "pissa": (lambda family: {"init_lora_weights": "pissa"}, False),
    "pissa-dora": (lambda family: {"init_lora_weights": "pissa", "use_dora": True}, False),
    "lora-plus": (lambda family: {}, True),
    "embedding": (lambda family: {"target_modules": [*TARGETS[family], EMBEDDING[family]]}, False),
    "embedding-lora-plus": (lambda family: {"target_modules": [*TARGETS[family], EMBEDDING[family]]}, True),
    "tokens": (lambda family: {"trainable_token_indices": TOKENS}, False),
    "layers": (lambda family: {"layers_to_transform": [1]}, False),
    "bias-all": (lambda family: {"bias": "all"}, False),
    "bias-lora": (lambda family: {"bias": "lora_only", "use_dora": True}, False),
}


def base_of(family: str, variant: str) -> str:
    """The fixture it runs on: tied embeddings where tokens are trained, biases where they are."""
    if family == "bert":
        return "bert"
    return {"tokens": "llama3", "bias-all": "llama-linear", "bias-lora": "llama-linear"}.get(variant, "llama2")


def load(models: Path, base: str, family: str) -> torch.nn.Module:
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if family == "llama":
        return transformers.AutoModelForCausalLM.from_pretrained(models / base, **options)
    config = transformers.AutoConfig.from_pretrained(models / base)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.num_labels = 2
    return transformers.AutoModelForSequenceClassification.from_pretrained(models / base, config=config, **options)


def make_batch(family: str) -> dict:
    generator = torch.Generator().manual_seed(crc32(family.encode()))
    ids = torch.randint(3, VOCAB, (BATCH, SEQ), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate([SEQ, 5, 9, 7]):
        mask[row, length:] = 0
        ids[row, length:] = 0
    for place, token in enumerate(TOKENS):
        ids[place, 2] = token
    labels = ids.masked_fill(mask == 0, -100) if family == "llama" else torch.tensor([0, 1, 1, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def optimizer_for(model: torch.nn.Module, lora_plus: bool) -> torch.optim.Optimizer:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not lora_plus:
        return torch.optim.AdamW([p for _, p in trained], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=LEARNING_RATE,
        loraplus_lr_ratio=LORA_PLUS_RATIO,
        loraplus_weight_decay=WEIGHT_DECAY,
        loraplus_lr_embedding=LORA_PLUS_EMBEDDING_RATE,
    )
    heads = [parameter for name, parameter in trained if "modules_to_save" in name]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if not any(p is head for head in heads)]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    if heads:
        optimizer.add_param_group({"params": heads, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY})
    return optimizer


def run(models: Path, folder: Path, family: str, variant: str, batch: dict) -> list[float]:
    options, lora_plus = VARIANTS[variant]
    base = base_of(family, variant)
    torch.manual_seed(crc32(f"{family}-{variant}".encode()))
    config = {
        "task_type": "CAUSAL_LM" if family == "llama" else "SEQ_CLS",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[family],
        **options(family),
    }
    model = get_peft_model(load(models, base, family), LoraConfig(**config)).train()
    shutil.rmtree(folder, ignore_errors=True)
    save_adapter(model, folder, base)
    optimizer = optimizer_for(model, lora_plus)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    final = {name: tensor.contiguous().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(final, folder / "final.safetensors", {"format": "pt"})
    steps = {
        "base": base,
        "family": family,
        "losses": losses,
        "gradient_norms": norms,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "lora_plus_ratio": LORA_PLUS_RATIO if lora_plus else None,
        "lora_plus_embedding_learning_rate": LORA_PLUS_EMBEDDING_RATE,
    }
    (folder / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--models", type=Path, default=root / "crates/model/tests/fixtures")
    parser.add_argument("--out", type=Path, default=root / "crates/train/tests/fixtures/variants")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for family in ("llama", "bert"):
        batch = make_batch(family)
        save_file(batch, arguments.out / f"{family}.safetensors", {"format": "pt"})
        for variant in VARIANTS:
            name = f"{family}-{variant}"
            if arguments.only and name not in arguments.only:
                continue
            losses = run(arguments.models, arguments.out / name, family, variant, batch)
            print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
