#!/usr/bin/env python3
"""Makes the fixtures of crates/model: tiny checkpoints of every architecture and what Transformers
and PEFT compute with them.

usage: scripts/references/models.py [--out crates/model/tests/fixtures] [--only NAME …]

Each fixture is a folder with config.json and model.safetensors (random weights, f32) and
reference.safetensors in the format of `calor parity`: ids, logits or hidden states, loss,
gradients of a few tensors (of encoders, those of a weighted sum of the hidden states). Variants of one architecture that differ in configuration alone have
folders of their own. Adapter fixtures add a PEFT adapter with non-zero weights, as PEFT saved it,
and the reference with the adapter applied. matching.json lists which modules PEFT 0.21.2 picks for
configurations of targets. Needs torch, transformers, peft and safetensors; everything is seeded.
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

VOCAB = 120
HIDDEN = 32

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}
# Half as wide: what most architectures need to show what they do.
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
SMALL_DECODER = DECODER | SMALL | {"num_key_value_heads": 1}
SMALL_ENCODER = ENCODER | SMALL
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that the wavelengths of an 8-wide head fall on all three sides of the corners.
    "original_max_position_embeddings": 64,
}

# Three dimensions of each half of a head are turned, each with a factor of its own.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.4],
    "long_factor": [1.2, 2.5, 6.0],
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name → (model_type, changes to the configuration, options)
DECODERS = {
    "llama2": ("llama", {"num_key_value_heads": 4}, {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, {}),
    "llama-linear": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
        },
        {"mask": "right"},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 16}, {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {"mask": "left"}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": False}, {}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True}, {}),
    "olmo2": ("olmo2", {}, {"base": SMALL_DECODER, "gradients": "some"}),
    # Sequences shorter than the original context, and longer ones.
    "phi3": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
        {"base": SMALL_DECODER, "gradients": "some", "mask": "right"},
    ),
    "phi3-long": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8, "sliding_window": 5},
        {"base": SMALL_DECODER, "gradients": "some"},
    ),
    "gpt2": ("gpt2", {}, {"base": GPT2, "gradients": "some"}),
    "gpt2-scaled": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
        {"base": GPT2, "gradients": "some", "mask": "right"},
    ),
    "gpt-neox": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"base": SMALL_DECODER, "gradients": "some"},
    ),
    "gpt-neox-serial": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
        {"base": SMALL_DECODER, "gradients": "some", "mask": "right"},
    ),
    # Caps low enough to bend most scores and logits.
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {"base": SMALL_DECODER, "gradients": "some"},
    ),
    # Not padded: what a padding token sees in a window of padding alone differs between Transformers'
    # attention implementations, and the loss counts it.
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        {"base": SMALL_DECODER, "gradients": "some"},
    ),
}
DEBERTA = {
    "relative_attention": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    # Distances up to 12 fall on both sides of the logarithm's start.
    "position_buckets": 8,
    "max_relative_positions": 16,
}
ENCODERS = {
    "bert": ("bert", {"hidden_act": "gelu"}, {"mask": "right"}),
    "bert-tanh": ("bert", {"hidden_act": "gelu_new"}, {}),
    "bert-relu": ("bert", {"hidden_act": "relu", "layer_norm_eps": 1e-5}, {"mask": "left"}),
    "roberta": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}, {"mask": "right"}),
    "roberta-left": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}, {"mask": "left"}),
    "electra": ("electra", {"embedding_size": 12}, {"base": SMALL_ENCODER, "gradients": "some", "mask": "right"}),
    "electra-wide": ("electra", {"embedding_size": 16}, {"base": SMALL_ENCODER, "gradients": "some"}),
    "modernbert": (
        "modernbert",
        {
            "num_hidden_layers": 4,
            "pad_token_id": 0,
            "local_attention": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
        {"base": SMALL_ENCODER, "gradients": "some", "mask": "right"},
    ),
    "modernbert-bias": (
        "modernbert",
        {
            "pad_token_id": 0,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
            "layer_types": ["sliding_attention", "full_attention"],
            "local_attention": 4,
        },
        {"base": SMALL_ENCODER, "gradients": "some"},
    ),
    "deberta": ("deberta-v2", DEBERTA, {"base": SMALL_ENCODER, "gradients": "some", "mask": "right"}),
    "deberta-own-keys": (
        "deberta-v2",
        DEBERTA
        | {
            "share_att_key": False,
            "norm_rel_ebd": "none",
            "position_buckets": -1,
            "position_biased_input": True,
            "type_vocab_size": 2,
            "max_relative_positions": 5,
        },
        {"base": SMALL_ENCODER, "gradients": "some"},
    ),
}
BATCH, SEQ = 3, 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=root / "crates/model/tests/fixtures")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True)

    def wanted(name: str) -> bool:
        return not arguments.only or name in arguments.only

    # A seed from the name: a new fixture leaves the others as they are.
    for name, (kind, changes, options) in DECODERS.items():
        if wanted(name):
            decoder(arguments.out / name, crc32(name.encode()), kind, changes, options)
    for name, (kind, changes, options) in ENCODERS.items():
        if wanted(name):
            encoder(arguments.out / name, crc32(name.encode()), kind, changes, options)
    for name, make in ADAPTERS.items():
        if wanted(name):
            make(arguments.out, arguments.out / name, crc32(name.encode()))
    if wanted("matching.json"):
        matching(arguments.out / "matching.json")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def build(kind: str, base: dict, changes: dict, auto, seed: int):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**base, **changes})
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Transformers starts from zero biases, unit norms and small weights; a fixture has to
            # notice each of them.
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                norm = any(part in name.lower() for part in ["norm", "ln_"]) and name.endswith("weight")
                # Gemma's norms multiply by 1 + weight.
                around_one = norm and not kind.startswith("gemma")
                parameter.copy_(1.0 + 0.2 * noise if around_one else 0.2 * noise)
            else:
                table = "embed" in name or name.endswith(("wte.weight", "wpe.weight"))
                parameter.copy_(noise * (0.5 if table else parameter.shape[-1] ** -0.5))
    return model.eval()


def tokens(pad: int | None, side: str | None, seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (BATCH, SEQ), generator=generator)
    if side is None:
        return ids, None
    mask = torch.ones_like(ids)
    for row, length in enumerate([SEQ, 4, 9]):
        hidden = slice(length, SEQ) if side == "right" else slice(0, SEQ - length)
        mask[row, hidden] = 0
        ids[row, hidden] = pad
    return ids, mask


def decoder(folder: Path, seed: int, kind: str, changes: dict, options: dict) -> None:
    model = build(kind, options.get("base", DECODER), changes, transformers.AutoModelForCausalLM, seed)
    fresh(folder)
    save(model, folder)
    ids, mask = tokens(DECODER["pad_token_id"], options.get("mask"), seed)
    gradients = some_gradients(model) if options.get("gradients") == "some" else decoder_gradients(model)
    reference(folder / "reference.safetensors", model, ids, mask, gradients)


def some_gradients(model) -> list[str]:
    """Norms and biases of every layer, the first layer's matrices and all that is in no layer."""
    # The softmax takes away what all keys have in common: these gradients are 0 but for rounding.
    nothing = ("self.key.bias", "pos_key_proj.bias")
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 or ".0." in name or not any(character.isdigit() for character in name)
        if not name.endswith(nothing)
    ]


def decoder_gradients(model) -> list[str]:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    there = dict(model.named_parameters())
    return [name for name in names if name in there]


def reference(path: Path, model, ids, mask, gradients: list[str], plain=lambda name: name) -> None:
    """Logits, and the loss of `labels=input_ids` over all tokens, padding included, as
    Transformers computes it."""
    model.requires_grad_(False)
    there = {plain(name): parameter for name, parameter in model.named_parameters()}
    for name in gradients:
        there[name].requires_grad_(True)
    output = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
    found = {"input_ids": ids, "logits": output.logits.detach()}
    if mask is not None:
        found["attention_mask"] = mask
    # What padding on the left sees differs between Transformers' attention implementations.
    if mask is None or bool(mask[:, 0].all()):
        if gradients:
            output.loss.backward()
        found["loss"] = output.loss.detach().reshape(1)
        found |= {f"grad.{name}": there[name].grad for name in gradients}
    write(path, found)


def encoder(folder: Path, seed: int, kind: str, changes: dict, options: dict) -> None:
    model = build(kind, options.get("base", ENCODER), changes, transformers.AutoModel, seed)
    fresh(folder)
    save(model, folder)
    ids, mask = tokens(model.config.pad_token_id, options.get("mask"), seed)
    gradients = some_gradients(model) if options.get("gradients") == "some" else []
    hidden_reference(folder / "reference.safetensors", model, ids, mask, gradients, seed)


def hidden_reference(path: Path, model, ids, mask, gradients: list[str], seed: int, plain=lambda name: name) -> None:
    """Hidden states, and gradients of their sum weighted by fixed noise where tokens are."""
    model.requires_grad_(False)
    there = {plain(name): parameter for name, parameter in model.named_parameters()}
    # A pooler that the hidden states do not depend on has none.
    gradients = [name for name in gradients if not name.startswith("pooler.")]
    for name in gradients:
        there[name].requires_grad_(True)
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found = {"input_ids": ids, "last_hidden_state": hidden.detach()}
    if mask is not None:
        found["attention_mask"] = mask
    if gradients:
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
        if mask is not None:
            weights = weights * mask.unsqueeze(-1)
        (hidden * weights).sum().backward()
        found["hidden_weights"] = weights
        found |= {f"grad.{name}": there[name].grad for name in gradients}
    write(path, found)


def save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    for extra in ["generation_config.json"]:
        (folder / extra).unlink(missing_ok=True)
    # The version of Transformers says nothing about the model and would change with every run.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("transformers_version", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write(path: Path, found: dict) -> None:
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


def adapt(model, config: LoraConfig, seed: int):
    """A PEFT model whose every trained tensor is away from its start."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def save_adapter(adapted, folder: Path, base: str) -> None:
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    # PEFT writes sets in the order of this process's hashes.
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ["target_modules", "exclude_modules"]:
        if isinstance(config[key], list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def classifier_reference(path: Path, adapted, ids, mask) -> None:
    with torch.no_grad():
        logits = adapted(input_ids=ids, attention_mask=mask).logits
    found = {"input_ids": ids, "logits": logits}
    if mask is not None:
        found["attention_mask"] = mask
    write(path, found)


def causal_adapter(out: Path, folder: Path, seed: int) -> None:
    """rsLoRA, patterns whose order matters not, a norm and the output layer trained in full."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "llama2", attn_implementation="eager")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        exclude_modules=r"model\.layers\.1\.mlp\..*",
        rank_pattern={r"layers\.1\.self_attn\..*": 2},
        alpha_pattern={"v_proj": 3},
        modules_to_save=["lm_head", "model.norm"],
    )
    adapted = adapt(model, config, seed)
    fresh(folder)
    save_adapter(adapted, folder, "llama2")
    ids, _ = tokens(None, None, seed)
    gradients = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "lm_head.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
    ]

    def plain(name: str) -> str:
        if ".lora_" in name:
            return name.replace(".default", "")
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        return name.replace(".modules_to_save.default.", ".")

    reference(folder / "reference.safetensors", adapted, ids, None, gradients, plain)


def tied_adapter(out: Path, folder: Path, seed: int) -> None:
    """Every linear layer of a model with tied embeddings, and the embedding trained in full: PEFT
    trains a copy, the output layer keeps the pretrained one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "llama3", attn_implementation="eager")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules="all-linear", modules_to_save=["embed_tokens"]
    )
    adapted = adapt(model, config, seed)
    fresh(folder)
    save_adapter(adapted, folder, "llama3")
    ids, _ = tokens(None, None, seed)
    reference(folder / "reference.safetensors", adapted, ids, None, [])


def output_adapter(out: Path, folder: Path, seed: int) -> None:
    """A pair on the output layer, whose frozen weight PEFT then stores too; tied to the embedding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "llama3", attn_implementation="eager")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["lm_head", "o_proj"])
    adapted = adapt(model, config, seed)
    fresh(folder)
    save_adapter(adapted, folder, "llama3")
    ids, _ = tokens(None, None, seed)
    names = ["base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"]
    reference(folder / "reference.safetensors", adapted, ids, None, names, lambda n: n.replace(".default", ""))


def sequence_adapter(base: str, labels: int, side: str, lora: dict):
    def make(out: Path, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            out / base, num_labels=labels, attn_implementation="eager"
        )
        adapted = adapt(model, LoraConfig(task_type="SEQ_CLS", **lora), seed)
        fresh(folder)
        save_adapter(adapted, folder, base)
        ids, mask = tokens(model.config.pad_token_id, side, seed)
        classifier_reference(folder / "reference.safetensors", adapted, ids, mask)

    return make


def token_adapter(base: str, targets: list[str]):
    def make(out: Path, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        model = transformers.AutoModelForTokenClassification.from_pretrained(
            out / base, num_labels=3, attn_implementation="eager"
        )
        config = LoraConfig(task_type="TOKEN_CLS", r=2, lora_alpha=4, target_modules=targets)
        adapted = adapt(model, config, seed)
        fresh(folder)
        save_adapter(adapted, folder, base)
        ids, _ = tokens(None, None, seed)
        classifier_reference(folder / "reference.safetensors", adapted, ids, None)

    return make


def whole_adapter(base: str, gradients: list[str]):
    """Every linear layer of a language model, with gradients of some pairs."""

    def make(out: Path, folder: Path, seed: int) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(out / base, attn_implementation="eager")
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules="all-linear")
        adapted = adapt(model, config, seed)
        fresh(folder)
        save_adapter(adapted, folder, base)
        ids, _ = tokens(None, None, seed)
        names = [f"base_model.model.{name}.lora_{side}.weight" for name in gradients for side in "AB"]
        reference(folder / "reference.safetensors", adapted, ids, None, names, lambda n: n.replace(".default", ""))

    return make


def hidden_adapter(base: str, gradients: list[str]):
    """Every linear layer of an encoder, with gradients of some pairs."""

    def make(out: Path, folder: Path, seed: int) -> None:
        model = transformers.AutoModel.from_pretrained(out / base, attn_implementation="eager")
        config = LoraConfig(task_type="FEATURE_EXTRACTION", r=2, lora_alpha=3, target_modules="all-linear")
        adapted = adapt(model, config, seed)
        fresh(folder)
        save_adapter(adapted, folder, base)
        ids, mask = tokens(0, "right", seed)
        names = [f"base_model.model.{name}.lora_{side}.weight" for name in gradients for side in "AB"]
        path = folder / "reference.safetensors"
        hidden_reference(path, adapted, ids, mask, names, seed, lambda n: n.replace(".default", ""))

    return make


def backbone_adapter(out: Path, folder: Path, seed: int) -> None:
    """AutoModel without a task type, every linear layer, the pooler's among them."""
    model = transformers.AutoModel.from_pretrained(out / "bert", attn_implementation="eager")
    adapted = adapt(model, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"), seed)
    fresh(folder)
    save_adapter(adapted, folder, "bert")
    ids, mask = tokens(0, "right", seed)
    with torch.no_grad():
        hidden = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
    write(
        folder / "reference.safetensors",
        {"input_ids": ids, "attention_mask": mask, "last_hidden_state": hidden},
    )


ADAPTERS = {
    "adapter-causal": causal_adapter,
    "adapter-tied": tied_adapter,
    "adapter-output": output_adapter,
    "adapter-llama-classifier": sequence_adapter(
        "mistral", 3, "right", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    ),
    "adapter-bert-classifier": sequence_adapter(
        "bert", 1, "left", {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "pooler.dense"]}
    ),
    "adapter-roberta-classifier": sequence_adapter(
        "roberta", 2, "right", {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"}
    ),
    "adapter-backbone": backbone_adapter,
    "adapter-bert-tokens": token_adapter("bert", ["query", "value"]),
    "adapter-roberta-tokens": token_adapter("roberta", ["query", "output.dense"]),
    "adapter-llama-tokens": token_adapter("llama3", ["q_proj", "down_proj"]),
    "adapter-gpt2": whole_adapter("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
    "adapter-phi3": whole_adapter(
        "phi3", ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"]
    ),
    "adapter-gpt-neox": whole_adapter(
        "gpt-neox", ["gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.1.mlp.dense_h_to_4h"]
    ),
    "adapter-gemma2": whole_adapter(
        "gemma2", ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.gate_proj"]
    ),
    "adapter-gpt2-classifier": sequence_adapter(
        "gpt2", 3, "right", {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "mlp.c_proj"]}
    ),
    "adapter-electra-classifier": sequence_adapter(
        "electra", 2, "right", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    ),
    "adapter-modernbert-classifier": sequence_adapter(
        "modernbert", 3, "right", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "modules_to_save": ["head"]}
    ),
    "adapter-modernbert-mean": sequence_adapter(
        "modernbert-bias", 1, "right", {"r": 2, "lora_alpha": 4, "target_modules": ["Wqkv"], "modules_to_save": ["head"]}
    ),
    "adapter-deberta-classifier": sequence_adapter(
        "deberta", 2, "right", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "modules_to_save": ["pooler"]}
    ),
    "adapter-deberta": hidden_adapter(
        "deberta", ["encoder.layer.0.attention.self.query_proj", "encoder.layer.1.attention.self.key_proj"]
    ),
    "adapter-modernbert": hidden_adapter("modernbert", ["layers.0.attn.Wqkv", "layers.2.mlp.Wi"]),
}


def matching(path: Path) -> None:
    """Which modules PEFT adapts, with which rank and alpha, for one configuration each."""
    decoder_configs = [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["proj"], "expect": "error"},
        {"target_modules": r".*layers\.[02]\.self_attn\.(q|k)_proj"},
        {"target_modules": r"layers\.0\.self_attn\.q_proj", "expect": "error"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.(up|down)_proj"},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r"(?!.*layers\.1\.).*(q_proj|o_proj)"},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"k_proj": 2, r".*layers\.1.*": 5, "model.layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {r"layers\.\d\.self_attn\.v_proj": 3, "v_proj": 9, "proj": 100},
        },
        {"target_modules": ["nothing"], "expect": "error"},
    ]
    encoder_configs = [
        {"target_modules": "all-linear"},
        {"target_modules": ["dense"]},
        {"target_modules": ["query", "attention.output.dense"]},
        {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]},
        {"target_modules": r".*\.layer\.0\..*(query|key)"},
    ]
    models = [
        ("llama", transformers.AutoModelForCausalLM, "CAUSAL_LM", {**DECODER, "num_hidden_layers": 3}, decoder_configs),
        ("llama", transformers.AutoModelForSequenceClassification, "SEQ_CLS", {**DECODER, "num_hidden_layers": 3}, decoder_configs),
        ("bert", transformers.AutoModelForSequenceClassification, "SEQ_CLS", ENCODER, encoder_configs),
        ("roberta", transformers.AutoModelForSequenceClassification, "SEQ_CLS", ENCODER, encoder_configs),
        ("bert", transformers.AutoModel, "FEATURE_EXTRACTION", ENCODER, encoder_configs),
    ]
    cases = []
    for kind, auto, task, base, configs in models:
        for options in configs:
            options = dict(options)
            expected = options.pop("expect", None)
            model = auto.from_config(transformers.AutoConfig.for_model(kind, **base))
            case = {"model_type": kind, "task_type": task, "config": options}
            try:
                adapted = get_peft_model(model, LoraConfig(task_type=task, r=4, lora_alpha=8, **options))
            except ValueError:
                assert expected == "error", (kind, options)
                case["modules"] = None
            else:
                assert expected is None, (kind, options)
                case["modules"] = {
                    name.removeprefix("base_model.model."): [module.r["default"], module.lora_alpha["default"]]
                    for name, module in adapted.named_modules()
                    if hasattr(module, "lora_alpha")
                }
            cases.append(case)
    path.write_text(json.dumps({"decoder": DECODER | {"num_hidden_layers": 3}, "encoder": ENCODER, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
