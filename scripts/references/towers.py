#!/usr/bin/env python3
"""Makes the fixtures of pretrained encoders in crates/model: tiny checkpoints of every type and what
Transformers and PEFT compute with them.

usage: scripts/references/towers.py [--out crates/model/tests/fixtures] [--only NAME …]

Each fixture is a folder with config.json and model.safetensors (random weights, f32), saved from
the class that hub files come from, and reference.safetensors: `input`, `last_hidden_state` and
`grad.*`, the gradients of its mean square with respect to the input and to tensors of the tower.
`adapter.<path>.lora_{A,B}.weight` is a PEFT adapter on the tower alone, away from its start;
`adapter.last_hidden_state` and `adapter.grad.*` are the same with it. Whisper adds
`short.last_hidden_state`, of the first frames only. Needs torch, transformers, peft and
safetensors; everything is seeded.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from zlib import crc32

import torch
import transformers
from models import fresh, save, write
from peft import LoraConfig, get_peft_model
from torch.nn import functional

VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    # Three patches and two pixels that belong to none.
    "image_size": 14,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 12,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 5,
}
WHISPER = {
    "vocab_size": 12,
    "num_mel_bins": 6,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 8,
    "max_source_positions": 16,
    "max_target_positions": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
ITEMS = 2
# Odd: the last token is of one frame and of padding.
SHORT_FRAMES = 9


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
    for name, make in FIXTURES.items():
        if not arguments.only or name in arguments.only:
            # A seed from the name: a new fixture leaves the others as they are.
            torch.manual_seed(crc32(name.encode()))
            make(arguments.out / name)


def vit(folder: Path) -> None:
    """A classifier's file: `vit.` before the backbone's names, a head beside it."""
    model = start(transformers.ViTForImageClassification, transformers.ViTConfig(**VISION))
    adapter = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    gradients = [
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
        "layers.0.attention.k_proj.weight",
        "layers.0.mlp.fc1.bias",
        "layers.1.attention.o_proj.weight",
        "layers.1.layernorm_after.weight",
        "layernorm.bias",
    ]
    make(folder, model, model.vit, pixels(14, 14), gradients, adapter)


def vit_wide(folder: Path) -> None:
    """The backbone alone, with its pooler: images and patches that are no squares, no biases of
    query, key and value, the approximation by tanh."""
    changes = {"image_size": [8, 18], "patch_size": [4, 6], "qkv_bias": False, "hidden_act": "gelu_new"}
    model = start(transformers.ViTModel, transformers.ViTConfig(**VISION | changes))
    adapter = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", exclude_modules=r"pooler\..*")
    gradients = ["embeddings.patch_embeddings.projection.weight", "layers.1.mlp.fc2.weight"]
    make(folder, model, model, pixels(8, 18), gradients, adapter)


def clip(folder: Path) -> None:
    """Both towers in one file, with the sigmoid approximation of OpenAI's models."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=4)
    model = start(transformers.CLIPModel, config)
    adapter = LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules="all-linear")
    gradients = [
        "embeddings.class_embedding",
        "embeddings.position_embedding.weight",
        "embeddings.patch_embedding.weight",
        "pre_layrnorm.weight",
        "encoder.layers.0.self_attn.q_proj.bias",
        "encoder.layers.0.layer_norm1.bias",
        "encoder.layers.1.mlp.fc2.weight",
    ]
    make(folder, model, model.vision_model, pixels(14, 14), gradients, adapter)


def siglip(folder: Path) -> None:
    """Both towers in one file; the vision tower has a pooling head of its own."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    model = start(transformers.SiglipModel, config)
    adapter = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules="all-linear",
        exclude_modules=r"head\..*",
        rank_pattern={r"layers\.1\..*": 3},
    )
    gradients = [
        "embeddings.position_embedding.weight",
        "embeddings.patch_embedding.bias",
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layers.1.mlp.fc1.weight",
        "post_layernorm.weight",
    ]
    make(folder, model, model.vision_model, pixels(14, 14), gradients, adapter)


def whisper(folder: Path) -> None:
    """Encoder and decoder in one file, as for generation."""
    model = start(transformers.WhisperForConditionalGeneration, transformers.WhisperConfig(**WHISPER))
    encoder = model.model.encoder
    adapter = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "fc2"])
    gradients = [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "embed_positions.weight",
        "layers.0.self_attn.k_proj.weight",
        "layers.1.self_attn.v_proj.bias",
        "layers.1.fc1.weight",
        "layer_norm.weight",
    ]
    mel = torch.randn(ITEMS, WHISPER["num_mel_bins"], 2 * WHISPER["max_source_positions"])
    # Transformers refuses shorter recordings: the same modules, with the first positions.
    with torch.no_grad():
        whole = whisper_of_any_length(encoder, mel)
        torch.testing.assert_close(whole, encoder(mel).last_hidden_state, rtol=0, atol=1e-6)
        short = whisper_of_any_length(encoder, mel[:, :, :SHORT_FRAMES])
    make(folder, model, encoder, mel, gradients, adapter, {"short.last_hidden_state": short})


def whisper_of_any_length(encoder, mel: torch.Tensor) -> torch.Tensor:
    states = functional.gelu(encoder.conv1(mel))
    states = functional.gelu(encoder.conv2(states)).permute(0, 2, 1)
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    for layer in encoder.layers:
        states = layer(states, None)
    return encoder.layer_norm(states)


FIXTURES = {
    "towers_vit": vit,
    "towers_vit_wide": vit_wide,
    "towers_clip": clip,
    "towers_siglip": siglip,
    "towers_whisper": whisper,
}


def start(kind, config):
    config._attn_implementation = "eager"
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Transformers starts from zero biases, unit norms and small weights; a fixture has to
            # notice each of them.
            noise = torch.randn_like(parameter)
            if parameter.dim() <= 1:
                norm = "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(1.0 + 0.2 * noise if norm else 0.2 * noise)
            elif any(part in name for part in ["position", "token", "class_embedding"]):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * math.prod(parameter.shape[1:]) ** -0.5)
    return model.eval()


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(ITEMS, 3, height, width)


def make(
    folder: Path,
    model,
    tower,
    features: torch.Tensor,
    gradients: list[str],
    config: LoraConfig,
    more: dict[str, torch.Tensor] | None = None,
) -> None:
    fresh(folder)
    save(model, folder)
    found = {"input": features} | (more or {})
    tower.requires_grad_(False)
    there = dict(tower.named_parameters())
    found |= results(tower, features, {name: there[name] for name in gradients})
    tower.requires_grad_(False)
    adapted = get_peft_model(tower, config).eval()
    pairs = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                # The start of `B` is zero; `A` is kept.
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
                plain = name.removeprefix("base_model.model.").replace(".default.", ".")
                pairs[plain] = parameter
    found |= {f"adapter.{name}": pair.detach() for name, pair in pairs.items()}
    trained = results(adapted, features, pairs)
    found |= {f"adapter.{name}": value for name, value in trained.items()}
    write(folder / "reference.safetensors", found)


def results(tower, features: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
    features = features.clone().requires_grad_(True)
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    hidden = tower(features).last_hidden_state
    hidden.square().mean().backward()
    found = {f"grad.{name}": tensor.grad for name, tensor in tensors.items()}
    return found | {"grad.input": features.grad, "last_hidden_state": hidden.detach()}


if __name__ == "__main__":
    main()
