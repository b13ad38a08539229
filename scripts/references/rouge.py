#!/usr/bin/env python3
"""Writes tests/main/fixtures/rouge.json: pairs of texts and what rouge-score says of them, for the test
of scripts/rouge.

    python scripts/references/rouge.py tests/main/fixtures/rouge.json

Needs rouge-score. Deterministic: the same version writes the same file.
"""

import json
import random
import sys

from rouge_score import rouge_scorer

PAIRS = [
    ("The patient has a fever.", "The patient has a fever."),
    ("No known drug allergies.", "The patient denies allergies to any known drug."),
    ("38.5\u00b0C at 10 o'clock; x-ray normal", "X ray: normal. Temperature 38.5 \u00b0C"),
    ("Noncontributory.", ""),
    ("\u2026", "\u2026"),
    ("a a a b", "a b a b a"),
    ("caf\u00e9 na\u00efve", "caf NA"),
]


def main():
    draw = random.Random(0)
    pool = "pain chest no the of left right since day days fever".split()
    text = lambda: " ".join(draw.choice(pool) for _ in range(draw.randint(1, 25)))
    pairs = PAIRS + [(text(), text()) for _ in range(12)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    rows = [
        {"expected": a, "found": b, **{k: v.fmeasure for k, v in scorer.score(a, b).items()}}
        for a, b in pairs
    ]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1)
        file.write("\n")


main()
