"""What the scripts of text data share: rows on their way to JSON lines. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "checkpoints"))
import common

Error = common.CheckpointError
say = common.say


def argument_parser(documentation: str, default_out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=documentation.splitlines()[0],
        epilog=documentation.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with the published files")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "data" / default_out,
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    return parser


def read(folder: Path, name: str) -> str:
    path = folder / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Error(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise Error(f"{path} is not UTF-8") from None


def write(path: Path, rows: list[dict]) -> None:
    """JSON lines; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    say(f"{path}: {len(rows):,} rows")


def run(main) -> None:
    try:
        main()
    except (Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
