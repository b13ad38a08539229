#!/usr/bin/env python3
"""Loads an adapter that calor wrote in PEFT and prints what it computes there.

usage: scripts/references/check_adapter.py MODEL_DIR ADAPTER_DIR [--expect FILE] [--tolerance X]

FILE is safetensors with input_ids [batch, seq], optionally attention_mask, and the logits (or
last_hidden_state) calor computed for them. Every key has to be used: a missing or unexpected one
is an error here, where PEFT only warns. Exits 1 when a difference is beyond the tolerance
(default 1e-4 of the largest magnitude). Needs torch, transformers, peft and safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
UNREAD = (".original_module.bias", ".modules_to_save.bias")
"""Ends of names that PEFT writes with bias="all" and sets to what other tensors hold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--expect", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    config = json.loads((arguments.adapter / "adapter_config.json").read_text())
    stored = load_file(arguments.adapter / "adapter_model.safetensors")
    options = {}
    if config["task_type"] == "SEQ_CLS":
        heads = [name for name in stored if name.endswith(("score.weight", "classifier.weight", "out_proj.weight"))]
        options["num_labels"] = stored[heads[0]].shape[0]
    base = getattr(transformers, CLASSES[config["task_type"]]).from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", **options
    )
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()

    # PEFT's own idea of what belongs in the file, and with which values.
    expected = get_peft_model_state_dict(model)
    wanted = {name for name in expected if not name.endswith(UNREAD)}
    problems = [f"missing {name}" for name in sorted(wanted - set(stored))]
    problems += [f"unexpected {name}" for name in sorted(set(stored) - set(expected))]
    problems += [
        f"{name} was not loaded"
        for name in sorted(set(stored) & set(expected))
        if not torch.equal(stored[name].float(), expected[name].float())
    ]
    for problem in problems:
        print(problem)
    print(f"{len(stored)} tensors, {len(problems)} problems")

    if arguments.expect is not None:
        data = load_file(arguments.expect)
        with torch.no_grad():
            output = model(input_ids=data["input_ids"], attention_mask=data.get("attention_mask"))
        name = "logits" if "logits" in data else "last_hidden_state"
        ours, theirs = data[name], output[name]
        difference = (ours - theirs).abs()
        if (mask := data.get("attention_mask")) is not None and ours.dim() == 3:
            difference = difference[mask.bool()]
        relative = float(difference.max() / theirs.abs().max())
        print(f"{name}: largest difference {float(difference.max()):.3g}, relative {relative:.3g}")
        if not relative <= arguments.tolerance:
            problems.append(name)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
