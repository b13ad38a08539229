#!/usr/bin/env python3
"""Writes crates/evaluate/tests/fixtures/entities.json: awkward and random tags with the entities
that seqeval reads from them, and its scores of predicted against expected tags.

    python scripts/references/entities.py crates/evaluate/tests/fixtures/entities.json

Needs seqeval. Deterministic: the same version writes the same file.
"""

import json
import random
import sys
import warnings

from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

# An I without a B, a change of type without a B, a B inside, tags without type, an entity at the
# end, other schemes' letters, a type with a dash.
AWKWARD = [
    ["I-A", "I-A", "O", "I-B"],
    ["B-A", "I-B", "I-B", "I-A"],
    ["B-A", "B-A", "I-A", "B-B"],
    ["O", "O"],
    ["B", "I", "O", "I"],
    ["S-A", "E-A", "B-A", "E-A", "I-A"],
    ["B-cell-line", "I-cell-line", "I-cell"],
    ["I-A"],
    ["B-A", "O", "I-A", "I-A", "O", "B-B"],
]


def case(expected, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "expected": expected,
            "predicted": predicted,
            "f1": float(f1_score(expected, predicted)),
            "precision": float(precision_score(expected, predicted)),
            "recall": float(recall_score(expected, predicted)),
        }


def main():
    draw = random.Random(0)
    tags = ["O", "O", "O", "B-A", "I-A", "B-B", "I-B", "S-A", "E-B"]
    rows = lambda lengths, pool: [[draw.choice(pool) for _ in range(n)] for n in lengths]
    cases = []
    for pool in (tags, tags[:7], ["O", "B-A", "I-A"]):
        for _ in range(6):
            lengths = [draw.randint(1, 9) for _ in range(4)]
            expected = rows(lengths, pool)
            predicted = [
                [tag if draw.random() < 0.7 else draw.choice(pool) for tag in row] for row in expected
            ]
            cases.append(case(expected, predicted))
    cases.append(case([["O", "B-A"]], [["O", "O"]]))
    cases.append(case([["O", "O"]], [["O", "B-A"]]))
    cases.append(case([["O", "O"]], [["O", "O"]]))
    awkward = AWKWARD + rows([draw.randint(1, 9) for _ in range(20)], tags)
    entities = [{"tags": row, "entities": get_entities(row)} for row in awkward]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"entities": entities, "cases": cases}, file)
        file.write("\n")


main()
