#!/usr/bin/env python3
"""Writes crates/sequence/tests/fixtures/dialogue: a tiny Llama with random weights, its tokenizer,
two chat templates, and what Transformers makes of some conversations with them.

    python scripts/references/dialogues.py crates/sequence/tests/fixtures/dialogue

`reference.json` holds, for each template and conversation, the text and the tokens of
`apply_chat_template` and the mask of the assistant's tokens (`return_assistant_tokens_mask`); the loss
of the model on the tokens of that mask; and the tokens that `generate` adds greedily to some prompts.
Needs torch and transformers. Deterministic: the same versions write the same files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|begin|>", "<|start|>", "<|end|>", "<|header|>"]

# The kind of ChatML: a system turn of its own where the conversation has none.
CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|start|>system\\nYou help people who are ill.<|end|>\\n' -}}
{% endif %}
{% if message['role'] == 'assistant' %}
{{ '<|start|>assistant\\n' }}{% generation %}{{ message['content'] + '<|end|>\\n' }}{% endgeneration %}
{% else %}
{{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|start|>assistant\\n' -}}
{% endif %}
"""

# The kind of Llama 3: a beginning-of-text token, trimmed contents, refusals, a macro, a date.
HEADERS = """{%- macro head(role) -%}
    {{- '<|header|>' ~ role ~ '<|header|>\\n\\n' -}}
{%- endmacro -%}
{{- bos_token }}
{%- set ns = namespace(turns=0) %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = none %}
    {%- set rest = messages %}
{%- endif %}
{{- head('system') + strftime_now('%d %b %Y') }}
{%- if system is not none %}{{- ' ' + system }}{%- endif %}
{{- eos_token }}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('only users and assistants speak') }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- head('assistant') }}{% generation %}{{- message.content.strip() + eos_token }}{% endgeneration %}
    {%- else %}
        {{- head(message.role) + message.content.strip() + eos_token }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- head('assistant') }}
{%- endif %}
"""
DATE = "26 Jul 2024"

CONVERSATIONS = [
    [
        {"role": "user", "content": "What is high blood pressure?"},
        {"role": "assistant", "content": "More than 140 over 90 at rest."},
    ],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Is fever a symptom?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And \u201cthirst\u201d, at 38 \u00b0C?\n\nI am worried."},
        {"role": "assistant", "content": "Too. Drink water."},
    ],
    [
        {"role": "user", "content": "It hurts after the caf\u00e9 <3 {x: 1}"},
        {"role": "assistant", "content": "Since when?\nI ask,\tbecause \u2026"},
        {"role": "user", "content": "yesterday"},
        {"role": "assistant", "content": "Rest."},
    ],
]


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [turn["content"] for conversation in CONVERSATIONS for turn in conversation]
    tokens.train_from_iterator(texts + ["user\n", "assistant\n", "system\n"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder, save_jinja_files=False)
    return fast


def model(folder: Path, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    made = LlamaForCausalLM(config).eval()
    made.save_pretrained(folder)
    return made


def rendered(fast, template: str, messages) -> dict:
    options = {"chat_template": template, "strftime_now": lambda _: DATE}
    text = fast.apply_chat_template(messages, tokenize=False, **options)
    prompt = fast.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True, **options
    )
    found = fast.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    return {
        "messages": messages,
        "text": text,
        "prompt": prompt,
        "tokens": list(found["input_ids"]),
        "mask": list(found["assistant_masks"]),
    }


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    fast = tokenizer(folder)
    llama = model(folder, len(fast))
    (folder / "headers.jinja").write_text(HEADERS, encoding="utf-8")
    templates = {
        name: [rendered(fast, template, messages) for messages in CONVERSATIONS]
        for name, template in (("chatml", CHATML), ("headers", HEADERS))
    }
    summed, count = 0.0, 0
    with torch.no_grad():
        for case in templates["chatml"]:
            ids = torch.tensor([case["tokens"]])
            labels = torch.where(torch.tensor([case["mask"]]) == 1, ids, -100)
            supervised = int((labels[:, 1:] != -100).sum())
            summed += float(llama(ids, labels=labels).loss) * supervised
            count += supervised
        generated = []
        for case in templates["chatml"]:
            prompt = fast(case["prompt"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt])
            out = llama.generate(
                ids, do_sample=False, max_new_tokens=24, attention_mask=torch.ones_like(ids)
            )
            generated.append({"prompt": prompt, "tokens": out[0, len(prompt) :].tolist()})
    reference = {
        "templates": templates,
        "loss": {"sum": summed, "tokens": count},
        "generated": generated,
    }
    with open(folder / "reference.json", "w", encoding="utf-8") as file:
        json.dump(reference, file, ensure_ascii=False)
        file.write("\n")


main()
