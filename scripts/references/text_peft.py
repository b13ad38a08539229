#!/usr/bin/env python3
"""Trains the text recipes with PyTorch, Transformers and PEFT: the same rows, model, adapter, optimizer,
schedule and number of steps as `recipes/bc5cdr-entities.toml`, `mts-dialog-section.toml` and
`mts-dialog-note.toml`, to have something beside their results.

    python scripts/references/text_peft.py entities data/bc5cdr MODEL [--steps N] [--epochs N]
    python scripts/references/text_peft.py section data/mts-dialog/section MODEL
    python scripts/references/text_peft.py note data/mts-dialog/note MODEL

Prints the held-out result, seconds of training and joules (processor time × 10 W, as Calor models them
where there is no counter) as JSON. The order of rows is another one than Calor's, and rows are padded, not
packed. Needs torch, transformers, peft and seqeval.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

WATTS_PER_CORE = 10.0
IGNORED = -100
SETTINGS = {
    # global batch, micro batch, epochs, adapter rate, head rate, warm-up, longest row
    "entities": (32, 8, 3, 1e-3, 2e-3, 0.1, 256),
    "section": (16, 8, 3, 1e-3, 2e-3, 0.1, 256),
    "note": (16, 2, 2, 5e-4, 5e-4, 0.05, 768),
}


def rows_of(folder: Path, split: str) -> list[dict]:
    with open(folder / f"{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def tagged(tokenizer, row: dict, classes: list[str], longest: int) -> tuple[list[int], list[int]]:
    found = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=longest)
    labels, before = [], None
    for word in found.word_ids():
        new = word is not None and word != before
        labels.append(classes.index(row["tags"][word]) if new else IGNORED)
        before = word
    return found["input_ids"], labels


def answered(tokenizer, row: dict, longest: int) -> tuple[list[int], list[int]]:
    def tokens(messages, prompt):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole, before = tokens(row["messages"], False), tokens(row["messages"][:-1], True)
    labels = [IGNORED] * len(before) + whole[len(before) :]
    return whole[-longest:], labels[-longest:]


def prepare(task: str, tokenizer, rows: list[dict], classes: list[str], longest: int):
    if task == "entities":
        return [tagged(tokenizer, row, classes, longest) for row in rows]
    if task == "section":
        texts = [row["text"] for row in rows]
        tokens = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        return [(ids, [classes.index(row["label"])]) for ids, row in zip(tokens, rows)]
    return [answered(tokenizer, row, longest) for row in rows]


def batch(task: str, samples, padding: int):
    longest = max(len(ids) for ids, _ in samples)
    pad = lambda values, filler: values + [filler] * (longest - len(values))
    ids = torch.tensor([pad(ids, padding) for ids, _ in samples])
    mask = torch.tensor([pad([1] * len(ids), 0) for ids, _ in samples])
    if task == "section":
        labels = torch.tensor([labels[0] for _, labels in samples])
    else:
        labels = torch.tensor([pad(labels, IGNORED) for _, labels in samples])
    return ids, mask, labels


def summed_loss(task: str, logits, labels):
    if task == "note":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="sum",
    )


def supervised(task: str, samples) -> int:
    skip = 1 if task == "note" else 0
    return sum(label != IGNORED for _, labels in samples for label in labels[skip:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=SETTINGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", type=Path, help="folder for the adapter")
    arguments = parser.parse_args()
    task = arguments.task
    size, micro, epochs, rate, head_rate, warm_up, longest = SETTINGS[task]
    epochs = arguments.epochs or epochs
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    training = rows_of(arguments.folder, "train")
    classes, extra = [], {}
    if task == "entities":
        classes = sorted({tag for row in training for tag in row["tags"]})
    elif task == "section":
        classes = sorted({row["label"] for row in training})
    loader, kind = {
        "entities": (AutoModelForTokenClassification, "TOKEN_CLS"),
        "section": (AutoModelForSequenceClassification, "SEQ_CLS"),
        "note": (AutoModelForCausalLM, "CAUSAL_LM"),
    }[task]
    if classes:
        extra = {"num_labels": len(classes)}
    model = loader.from_pretrained(arguments.model, dtype=torch.float32, **extra)
    targets = {
        "note": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }.get(task, ["query", "key", "value", "dense"])
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type=kind
    )
    model = get_peft_model(model, config)
    samples = prepare(task, tokenizer, training, classes, longest)

    heads = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    pairs = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    groups = [{"params": pairs, "lr": rate}] + ([{"params": heads, "lr": head_rate}] if heads else [])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps_an_epoch = math.ceil(len(samples) / size)
    steps = min(steps_an_epoch * epochs, arguments.steps or 10**9)
    warm = math.ceil(warm_up * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warm
        if step < warm
        else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))),
    )
    draw = random.Random(0)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    model.train()
    began, began_cpu, tokens = time.perf_counter(), time.process_time(), 0
    for step in range(steps):
        if step % steps_an_epoch == 0:
            order = draw.sample(range(len(samples)), len(samples))
        place = step % steps_an_epoch * size
        chosen = sorted((samples[i] for i in order[place : place + size]), key=lambda s: -len(s[0]))
        total = supervised(task, chosen)
        for start in range(0, len(chosen), micro):
            ids, mask, labels = batch(task, chosen[start : start + micro], padding)
            logits = model(input_ids=ids, attention_mask=mask).logits
            (summed_loss(task, logits, labels) / max(total, 1)).backward()
            tokens += int(mask.sum())
        torch.nn.utils.clip_grad_norm_([*pairs, *heads], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 8 == 0:
            print(f"step {step + 1} of {steps}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    elapsed_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    if arguments.adapter:
        model.save_pretrained(arguments.adapter)
        tokenizer.save_pretrained(arguments.adapter)

    held_out = rows_of(arguments.folder, "held_out")
    evaluated = prepare(task, tokenizer, held_out, classes, longest)
    by_length = sorted(range(len(evaluated)), key=lambda i: -len(evaluated[i][0]))
    loss, count, right = 0.0, 0, 0
    expected, predicted = [], []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(by_length), micro):
            chosen = [evaluated[i] for i in by_length[start : start + micro]]
            ids, mask, labels = batch(task, chosen, padding)
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss += float(summed_loss(task, logits, labels))
            count += supervised(task, chosen)
            best = logits.argmax(-1)
            if task == "section":
                right += int((best == labels).sum())
            if task == "entities":
                for row in range(len(chosen)):
                    kept = labels[row] != IGNORED
                    expected.append([classes[i] for i in labels[row][kept].tolist()])
                    predicted.append([classes[i] for i in best[row][kept].tolist()])
    found = {"task": task, "steps": steps, "loss": loss / count}
    if task == "entities":
        from seqeval.metrics import f1_score, precision_score, recall_score

        found |= {
            "f1": float(f1_score(expected, predicted)),
            "precision": float(precision_score(expected, predicted)),
            "recall": float(recall_score(expected, predicted)),
        }
    elif task == "section":
        found["accuracy"] = right / len(held_out)
    else:
        found["perplexity"] = math.exp(loss / count)
    found |= {
        "elapsed_s": round(elapsed_s, 1),
        "tokens_per_s": round(tokens / elapsed_s),
        "energy_j": round(cpu_s * WATTS_PER_CORE),
        "energy_j_per_token": round(cpu_s * WATTS_PER_CORE / tokens, 5),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(found))


main()
