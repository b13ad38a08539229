#!/usr/bin/env python3
"""Writes what Transformers and PEFT compute, for `calor parity` to be compared with.

usage: scripts/export_reference.py MODEL_DIR --out FILE [options]

FILE is safetensors, everything f32 but the ids:

  input_ids            [batch, seq] int64
  attention_mask       [batch, seq] int64, only where there is padding (--mask, --text)
  logits               [batch, seq, vocab] (causal) or [batch, labels] (sequence)
  last_hidden_state    [batch, seq, hidden] (encoder)
  loss                 [1], causal: the mean next-token cross-entropy of input_ids against
                       themselves, shifted, as Transformers gives it for labels=input_ids
                       (it counts padding as well)
  grad.<tensor name>   gradient of that loss, under the tensor's name in the checkpoint or the
                       adapter

The model runs in evaluation mode, in f32 whatever the checkpoint's type, with eager attention
and deterministic algorithms. With --adapter, a PEFT adapter is applied first, the modules it
saves in full included. Needs torch, transformers, safetensors and, for --adapter, peft.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
}
ENCODER_TYPES = {
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "modernbert",
    "deberta-v2",
}
CLASS_OF_TASK = {"CAUSAL_LM": "causal", "SEQ_CLS": "sequence", "FEATURE_EXTRACTION": "encoder"}
SMALL_ELEMENTS = 1 << 20
"""`all-small` takes the gradients of the tensors up to this many elements (4 MiB of f32)."""


class ExportError(Exception):
    """Something a person has to know: what went wrong and what to do about it."""


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    config = json.loads((arguments.model / "config.json").read_text())
    kind = arguments.kind or default_kind(config, arguments.adapter)
    model = load(arguments.model, kind, arguments.adapter, arguments.labels)
    input_ids, mask = inputs(arguments, model.config)
    reference = {"input_ids": input_ids}
    if mask is not None:
        reference["attention_mask"] = mask
    if arguments.gradients and kind != "causal":
        raise ExportError("--gradients are those of the next-token loss: they need a causal model")
    wanted = wanted_gradients(model, arguments.model, arguments.adapter, arguments.gradients)
    reference.update(outputs(model, kind, input_ids, mask, wanted))
    write(arguments.out, reference, arguments.model, kind)
    for name, tensor in reference.items():
        largest = "" if tensor.dtype == torch.int64 else f"  largest magnitude {tensor.abs().max():.6g}"
        print(f"{name}  {list(tensor.shape)}{largest}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT adapter to apply first")
    parser.add_argument(
        "--class",
        dest="kind",
        choices=sorted(CLASSES),
        help="default: what the adapter was made for, else encoder for BERT-like models and "
        "causal for the rest",
    )
    parser.add_argument("--labels", type=int, metavar="N", help="labels of a sequence classifier "
                        "(default: those of the adapter's head, else of config.json)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="draws the ids and the lengths")
    parser.add_argument(
        "--mask",
        choices=["right", "left", "none"],
        default="none",
        help="pad rows to different lengths, on this side",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="a row of this text instead of random ids (repeat for more); needs the tokenizer",
    )
    parser.add_argument(
        "--gradients",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"checkpoint tensor names, or all-small: every tensor up to {SMALL_ELEMENTS} elements",
    )
    arguments = parser.parse_args()
    for path in [arguments.model, *([arguments.adapter] if arguments.adapter else [])]:
        if not path.is_dir():
            parser.error(f"{path} is no folder")
    if arguments.batch < 1 or arguments.seq < 2:
        parser.error("--batch takes at least 1 and --seq at least 2")
    return arguments


def default_kind(config: dict, adapter: Path | None) -> str:
    if adapter is not None:
        task = json.loads((adapter / "adapter_config.json").read_text()).get("task_type")
        if task in CLASS_OF_TASK:
            return CLASS_OF_TASK[task]
    return "encoder" if config["model_type"] in ENCODER_TYPES else "causal"


def load(folder: Path, kind: str, adapter: Path | None, labels: int | None) -> torch.nn.Module:
    """The model in f32, evaluation mode, with the adapter on it and no gradient wanted anywhere."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    if kind == "sequence":
        labels = labels or (adapter and adapter_labels(adapter))
        if labels:
            options["num_labels"] = labels
    model, loading = getattr(transformers, CLASSES[kind]).from_pretrained(
        folder, output_loading_info=True, **options
    )
    # A head that the adapter brings, and a pooler that no output here depends on, may be new.
    new = [
        name
        for name in loading["missing_keys"]
        if not (kind == "encoder" and name.startswith("pooler."))
        and not (kind == "sequence" and name.split(".")[0] in {"classifier", "score"})
    ]
    if new:
        raise ExportError(f"{folder} lacks {', '.join(sorted(new))}: is --class {kind} right?")
    if adapter is not None:
        model = apply_adapter(model, adapter)
    model.requires_grad_(False)
    return model.eval()


def apply_adapter(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT only warns of keys it misses; a reference with half an adapter would be a lie.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(model, adapter)
        except UserWarning as warning:
            raise ExportError(f"{adapter}: {warning}") from warning


def adapter_labels(adapter: Path) -> int | None:
    """The number of labels of the head that an adapter saved in full, if it did."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():
            if name.endswith(("score.weight", "classifier.weight", "classifier.out_proj.weight")):
                return file.get_slice(name).get_shape()[0]
    return None


def inputs(arguments: argparse.Namespace, config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [batch, seq] and, where a row is padded, the mask of the same shape."""
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    if arguments.text:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
        rows = [tokenizer(text, padding=False, truncation=False).input_ids for text in arguments.text]
        side = "right" if arguments.mask == "none" else arguments.mask
    else:
        # Ids of special tokens mean something to some models (padding, end of text): leave them out.
        special = {
            token
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
            for value in [getattr(config, name, None)]
            for token in (value if isinstance(value, list) else [value])
        }
        ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
        generator = torch.Generator().manual_seed(arguments.seed)
        lengths = [arguments.seq] * arguments.batch
        if arguments.mask != "none":
            drawn = torch.randint(
                max(2, arguments.seq // 4), arguments.seq, (arguments.batch,), generator=generator
            )
            # One row stays whole, so that a batch of several shows both.
            lengths = [arguments.seq if row == 0 and arguments.batch > 1 else int(drawn[row])
                       for row in range(arguments.batch)]
        rows = [
            ordinary[torch.randint(len(ordinary), (length,), generator=generator)].tolist()
            for length in lengths
        ]
        side = arguments.mask
    seq = arguments.seq if not arguments.text else max(len(row) for row in rows)
    ids = torch.full((len(rows), seq), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(seq - len(row), seq) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, None if bool(mask.all()) else mask


def outputs(model, kind, input_ids, mask, wanted: dict[str, torch.nn.Parameter]) -> dict:
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    loss_here = kind == "causal"
    with torch.set_grad_enabled(bool(wanted)):
        result = model(
            input_ids=input_ids,
            attention_mask=mask,
            **({"labels": input_ids, "use_cache": False} if loss_here else {}),
        )
    found = {}
    if kind == "encoder":
        found["last_hidden_state"] = result.last_hidden_state.detach()
    else:
        found["logits"] = result.logits.detach()
    if loss_here:
        found["loss"] = result.loss.detach().reshape(1)
    if wanted:
        result.loss.backward()
    for name, parameter in wanted.items():
        if parameter.grad is None:
            raise ExportError(f"the loss does not depend on {name}")
        found[f"grad.{name}"] = parameter.grad
    return found


def wanted_gradients(
    model, folder: Path, adapter: Path | None, names: list[str]
) -> dict[str, torch.nn.Parameter]:
    """The parameters behind names in the checkpoint or the adapter, in the files' order."""
    if not names:
        return {}
    in_file = stored_names(folder, adapter)
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (plain := stored_name(name, model, in_file)) is not None:
            parameters[plain] = parameter
    if "all-small" in names:
        small = [name for name, parameter in parameters.items() if parameter.numel() <= SMALL_ELEMENTS]
        names = [*names, *small]
    unknown = sorted(set(names) - set(parameters) - {"all-small"})
    if unknown:
        raise ExportError(f"no parameter of the model comes from a tensor called {', '.join(unknown)}")
    return {name: parameters[name] for name in in_file if name in names}


def stored_name(name: str, model, in_file: list[str]) -> str | None:
    """The tensor of a file that a parameter of the (possibly PEFT) model was read from."""
    if ".original_module." in name:
        return None
    name = name.replace(".default.", ".").replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    base = model
    candidates = []
    if hasattr(model, "peft_config"):
        base = model.get_base_model()
        candidates.append(name)
        name = name.removeprefix("base_model.model.")
    prefix = f"{base.base_model_prefix}."
    candidates += [name, name.removeprefix(prefix), prefix + name]
    return next((candidate for candidate in candidates if candidate in in_file), None)


def stored_names(folder: Path, adapter: Path | None) -> list[str]:
    """Names of the tensors in the checkpoint, single or sharded, and in the adapter."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        files = [folder / name for name in sorted(shards)]
    else:
        files = [folder / "model.safetensors"]
    if adapter is not None:
        files.append(adapter / "adapter_model.safetensors")
    names = []
    for path in files:
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names


def write(path: Path, tensors: dict, folder: Path, kind: str) -> None:
    import transformers

    metadata = {
        "format": "pt",
        "model": folder.resolve().name,
        "class": CLASSES[kind],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except ExportError as error:
        sys.exit(f"export_reference: {error}")
