#!/usr/bin/env python3
"""A few LoRA steps with Transformers and PEFT in f32, to be repeated step by step with calor.

usage: scripts/references/peft_steps.py MODEL_DIR --task TASK --out DIR [options]

TASK is causal_lm or sequence_classification. DIR gets

  initial/            the PEFT adapter before the first step (a classifier's head included)
  batch.safetensors   the one batch every step sees: input_ids, attention_mask [batch, seq] and
                      labels, [batch, seq] with -100 in the padding or [batch], all int64
  steps.json          losses (each before its update), gradient norms before clipping, and every
                      setting of the run
  final/              the PEFT adapter after the last step

`calor bench step --adapter DIR/initial --data DIR/batch.safetensors` runs the same steps. With
--calor BINARY it is run and its losses compared: exit status 1 when one is further than
--tolerance from PEFT's.
Every dropout is 0, the adapter's and the backbone's, so both sides compute one function.
Needs torch, transformers, peft and safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CAUSAL_LM = "causal_lm"
SEQUENCE_CLASSIFICATION = "sequence_classification"
TASKS = (CAUSAL_LM, SEQUENCE_CLASSIFICATION)
IGNORED = -100
"""Label of a position that counts in no loss."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides the model, the adapter and the batch (PyTorch's defaults)."""

    steps: int = 10
    learning_rate: float = 2e-4
    schedule: str = "constant"
    max_grad_norm: float = 1.0
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01

    def learning_rate_at(self, step: int) -> float:
        """Of 0-based `step`; linear falls from the full rate to 0 one step past the last."""
        if self.schedule == "linear":
            return self.learning_rate * (self.steps - step) / self.steps
        return self.learning_rate


def load_base(
    folder: Path, task: str, attention: str = "eager", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The checkpoint without dropout; a binary classifier's new head is drawn from torch's seed."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": dtype, "attn_implementation": attention, "local_files_only": True}
    if task == CAUSAL_LM:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    config.num_labels = 2
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, **options
    )


def new_adapter(base: torch.nn.Module, task: str, rank: int, alpha: int) -> torch.nn.Module:
    """All linear layers but the head, dropout 0, PEFT's own initialisation."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        base,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM" if task == CAUSAL_LM else "SEQ_CLS",
        ),
    )


def load_trainable(base: torch.nn.Module, adapter: Path, **options) -> torch.nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter, is_trainable=True, **options)


def make_batch(folder: Path, task: str, batch: int, seq: int, seed: int, full: bool) -> dict:
    """Made-up records of laboratory values, tokenised with the model's tokenizer.

    With `full` every row has exactly `seq` tokens; otherwise rows are padded on the right to
    between a quarter of `seq` and all of it. In a classifier's batch the label is 1 where the
    record tells of a high creatinine.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    draw = random.Random(seed)
    pad = tokenizer.pad_token_id
    ids = torch.full((batch, seq), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    positive = torch.tensor([draw.random() < 0.5 for _ in range(batch)], dtype=torch.int64)
    for row in range(batch):
        length = seq if full or row == 0 else draw.randint(seq // 4, seq)
        text = record(draw, bool(positive[row]), events=seq)
        tokens = tokenizer(text, truncation=True, max_length=length, padding=False).input_ids
        assert len(tokens) == length, f"a record of {len(tokens)} tokens, {length} wanted"
        ids[row, :length] = torch.tensor(tokens)
        mask[row, :length] = 1
    labels = positive if task == SEQUENCE_CLASSIFICATION else ids.masked_fill(mask == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def record(draw: random.Random, high_creatinine: bool, events: int) -> str:
    """One made-up person's record: about four tokens an event, of nobody in particular."""
    analyses = {
        "haemoglobin": (8.4, 0.9, "mmol/L"),
        "leukocytes": (7.1, 2.0, "10^9/L"),
        "potassium": (4.1, 0.4, "mmol/L"),
        "sodium": (140.0, 3.0, "mmol/L"),
        "albumin": (38.0, 4.0, "g/L"),
        "C-reactive protein": (12.0, 9.0, "mg/L"),
    }
    creatinine = 180.0 if high_creatinine else 75.0
    parts = [f"{draw.choice(['Woman', 'Man'])}, {draw.randint(30, 90)} years old."]
    parts.append(f"Creatinine {draw.gauss(creatinine, 10.0):.0f} umol/L.")
    for _ in range(events):
        name, (mean, deviation, unit) = draw.choice(list(analyses.items()))
        parts.append(f"{name} {abs(draw.gauss(mean, deviation)):.1f} {unit},")
        if draw.random() < 0.2:
            parts.append(f"{draw.randint(2, 60)} days later:")
    return " ".join(parts)


def optimizer_for(model: torch.nn.Module, settings: Settings, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trainable(model),
        lr=settings.learning_rate,
        betas=(settings.beta_1, settings.beta_2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        **options,
    )


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model, optimizer, batch: dict, settings: Settings, index: int) -> tuple[float, float]:
    """One update; the loss before it, and the norm of all gradients together before clipping."""
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable(model), settings.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(index)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def prepare(folder: Path, task: str, out: Path, options: argparse.Namespace, full: bool) -> None:
    """Writes the initial adapter and the batch of a run."""
    torch.manual_seed(options.seed)
    model = new_adapter(load_base(folder, task), task, options.rank, options.alpha)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "initial")
    batch = make_batch(folder, task, options.batch, options.seq, options.seed, full)
    save_file(batch, out / "batch.safetensors", {"format": "pt", "task": task})


def run(folder: Path, task: str, out: Path, settings: Settings) -> dict:
    """The steps from what `prepare` wrote; the final adapter goes beside it."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model = load_trainable(load_base(folder, task), out / "initial").train()
    optimizer = optimizer_for(model, settings)
    batch = load_file(out / "batch.safetensors")
    losses, norms = [], []
    for index in range(settings.steps):
        loss, norm = step(model, optimizer, batch, settings, index)
        print(f"step {index + 1}: loss {loss:.6f}, gradient norm {norm:.4f}", file=sys.stderr)
        losses.append(loss)
        norms.append(norm)
    model.save_pretrained(out / "final")
    return {"losses": losses, "gradient_norms": norms}


def compare_with_calor(options: argparse.Namespace, settings: Settings, ours: dict) -> None:
    """Runs the same steps with calor, prints both losses of each, and exits 1 when they differ."""
    command = [options.calor, "bench", "step", "--model", options.model, "--task", options.task]
    command += ["--adapter", options.out / "initial", "--data", options.out / "batch.safetensors"]
    command += ["--windows", "1", "--steps", str(settings.steps), "--warmup", "0"]
    command += ["--profiled-steps", "0", "--device", "cpu", "--json"]
    command += ["--learning-rate", str(settings.learning_rate)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"peft_steps: calor failed with status {done.returncode}: {done.stderr.strip()}")
    losses = json.loads(done.stdout)["losses"]
    if len(losses) != settings.steps:
        sys.exit(f"peft_steps: calor gave {len(losses)} losses, {settings.steps} wanted")
    print(f"{'step':>4} {'PEFT':>12} {'calor':>12} {'relative':>9}")
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, ours["losses"])]
    for index, (a, b) in enumerate(zip(losses, ours["losses"])):
        print(f"{index + 1:4} {b:12.7f} {a:12.7f} {differences[index]:9.1e}")
    if not max(differences) <= options.tolerance:
        sys.exit(f"peft_steps: the losses differ by more than {options.tolerance:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="every row of full length, no padding")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument(
        "--prepare-only", action="store_true", help="write initial/ and batch.safetensors, run nothing"
    )
    parser.add_argument("--calor", type=Path, metavar="BINARY", help="run the same steps with it")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative (default 1e-3)")
    parser.add_argument("--schedule", choices=["constant", "linear"], default=Settings.schedule)
    options = parser.parse_args()
    if options.calor and options.schedule != "constant":
        parser.error("calor bench step keeps the learning rate constant")
    settings = Settings(
        steps=options.steps, learning_rate=options.learning_rate, schedule=options.schedule
    )
    prepare(options.model, options.task, options.out, options, options.full)
    if options.prepare_only:
        return
    measured = run(options.model, options.task, options.out, settings)
    import peft
    import transformers

    content = {
        **measured,
        **vars(settings),
        "task": options.task,
        "model": options.model.resolve().name,
        "batch": options.batch,
        "seq": options.seq,
        "rank": options.rank,
        "alpha": options.alpha,
        "seed": options.seed,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    temporary = options.out / ".steps.json"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, options.out / "steps.json")
    if options.calor:
        compare_with_calor(options, settings, measured)


if __name__ == "__main__":
    main()
