#!/usr/bin/env python3
"""Makes the fixtures of quantised weights: what bitsandbytes stores, and what it computes.

usage: scripts/references/quantization.py [--out crates/model/tests/fixtures]

quantization.safetensors holds, for f32 and bf16 weights of odd shapes, the codes and scales that
bitsandbytes' CPU code gives them in NF4, with and without double quantisation, and in 8 bits, and the
values they stand for. llama-nf4, llama-nf4-single, llama-int8 and bert-nf4 are tiny checkpoints that
Transformers has quantised and saved; each reference.safetensors is computed from the dequantised
weights in f32, without the quantised activations of LLM.int8(). Needs torch, transformers,
bitsandbytes and safetensors; everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from zlib import crc32

import bitsandbytes.functional as bnb
import torch
import transformers
from models import DECODER, ENCODER, build, decoder_gradients, fresh, reference, save, tokens, write
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BIASES = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
# name → (Transformers class, model_type, changes to the configuration, quantisation)
CHECKPOINTS = {
    "llama-nf4": ("AutoModelForCausalLM", "llama", BIASES, NF4 | {"bnb_4bit_use_double_quant": True}),
    "llama-nf4-single": ("AutoModelForCausalLM", "llama", {"tie_word_embeddings": True}, NF4),
    "llama-int8": ("AutoModelForCausalLM", "llama", BIASES, {"load_in_8bit": True}),
    "bert-nf4": ("AutoModel", "bert", {"num_hidden_layers": 1}, NF4 | {"bnb_4bit_use_double_quant": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=root / "crates/model/tests/fixtures")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    write(arguments.out / "quantization.safetensors", weights())
    for name, (auto, kind, changes, options) in CHECKPOINTS.items():
        checkpoint(arguments.out / name, crc32(name.encode()), auto, kind, changes, options)


def weights() -> dict:
    generator = torch.Generator().manual_seed(crc32(b"quantization"))
    found = {"nf4.map": bnb.get_4bit_type("nf4", device="cpu"), "dynamic.map": bnb.create_dynamic_map()}
    # The first ends within a block and a byte; the last has more than 256 blocks.
    for name, shape, dtype in [
        ("small", (33, 71), torch.float32),
        ("half", (24, 64), torch.bfloat16),
        ("large", (129, 141), torch.bfloat16),
    ]:
        weight = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        weight[1] *= 4
        weight[2, :5] = 0
        found[f"{name}.weight"] = weight
        codes, state = bnb.quantize_4bit(weight.clone(), quant_type="nf4")
        found |= {f"{name}.nf4.codes": codes.flatten(), f"{name}.nf4.absmax": state.absmax}
        again, double = bnb.quantize_4bit(weight.clone(), quant_type="nf4", compress_statistics=True)
        assert torch.equal(codes, again)
        found |= {
            f"{name}.double.codes": double.absmax,
            f"{name}.double.absmax": double.state2.absmax,
            f"{name}.double.offset": double.offset.reshape(1),
        }
        int8, scales, _ = bnb.int8_vectorwise_quant(weight.clone())
        found |= {f"{name}.int8.codes": int8.view(torch.uint8), f"{name}.int8.absmax": scales}
        if name == "small":
            found[f"{name}.nf4.values"] = bnb.dequantize_4bit(codes, state)
            found[f"{name}.double.values"] = bnb.dequantize_4bit(codes, double)
            found[f"{name}.int8.values"] = bnb.int8_vectorwise_dequant(int8, scales)
    return found


def checkpoint(folder: Path, seed: int, auto: str, kind: str, changes: dict, options: dict) -> None:
    auto = getattr(transformers, auto)
    encoder = kind == "bert"
    with tempfile.TemporaryDirectory() as plain:
        build(kind, ENCODER if encoder else DECODER, changes, auto, seed).save_pretrained(plain)
        quantized = auto.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, attn_implementation="eager"
        )
    fresh(folder)
    save(quantized, folder)
    model = dequantized(folder, auto)
    ids, mask = tokens(0, None, seed)
    if encoder:
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        write(folder / "reference.safetensors", {"input_ids": ids, "last_hidden_state": hidden})
    else:
        # Of what stays a float: quantised weights have no gradient.
        gradients = [name for name in decoder_gradients(model) if "_proj.weight" not in name]
        reference(folder / "reference.safetensors", model, ids, mask, gradients)


def dequantized(folder: Path, auto):
    """The stored checkpoint in f32, by the formula: code book times scales. bitsandbytes 0.50.2's kernel
    for processors with AVX-512 is off by up to 0.3 of a block's scale on shapes like these."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    stored = load_file(folder / "model.safetensors")
    book = bnb.get_4bit_type("nf4", device="cpu")
    values = {}
    for name, tensor in stored.items():
        state, scales = f"{name}.quant_state.bitsandbytes__nf4", f"{name.removesuffix('weight')}SCB"
        if state in stored:
            state = json.loads(bytes(stored[state].tolist()))
            absmax = stored[f"{name}.absmax"]
            if "nested_offset" in state:
                nested = stored[f"{name}.nested_absmax"].repeat_interleave(state["nested_blocksize"])
                absmax = stored[f"{name}.nested_quant_map"][absmax.long()] * nested[: len(absmax)]
                absmax = absmax + state["nested_offset"]
            packed = tensor.flatten().view(torch.uint8)
            codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
            size = torch.Size(state["shape"]).numel()
            weight = book[codes][:size] * absmax.repeat_interleave(state["blocksize"])[:size]
            values[name] = weight.reshape(state["shape"])
        elif scales in stored:
            values[name] = tensor.float() * stored[scales][:, None] / 127
        elif ".weight." not in name and not name.endswith(("SCB", "weight_format")):
            values[name] = tensor.float()
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


if __name__ == "__main__":
    main()
