"""What the data-set scripts share: rows, labels and splits on their way to a MEDS cohort.

Standard library only until `inside` has been called; numpy and pyarrow are there from then on.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "checkpoints"))
import common

REQUIREMENTS = {"numpy": "numpy", "pyarrow": "pyarrow"}
INSIDE = "CALOR_DATASET_PYTHON"  # set once a script runs in the right environment

BIRTH, DEATH, FEMALE, MALE = "MEDS_BIRTH", "MEDS_DEATH", "SEX//F", "SEX//M"
PERSON_CODES = {
    BIRTH: ("birth", []),
    DEATH: ("death", []),
    FEMALE: ("female", ["SEX"]),
    MALE: ("male", ["SEX"]),
}
"""What `codes.parquet` says of what many cohorts have: code -> (description, parents)."""

INDEX_DAY = datetime.datetime(2000, 1, 1)
"""The day on which everyone starts where a source gives times since a start and no dates."""
INDEX_US = 946_684_800_000_000  # INDEX_DAY, microseconds since 1970-01-01
MINUTE_US, HOUR_US, DAY_US = 60_000_000, 3_600_000_000, 86_400_000_000
DAYS_PER_YEAR = 365.25
SPLITS = ["train", "tuning", "held_out"]
SUBJECTS_PER_SHARD = 1000

Error = common.CheckpointError
say = common.say


def argument_parser(documentation: str, default_out: str, source: str,
                    draws: bool = True) -> argparse.ArgumentParser:
    """SOURCE, --out, --force and --python, and --seed where splits are drawn; `source` says what
    SOURCE is."""
    parser = argparse.ArgumentParser(
        description=documentation.splitlines()[0],
        epilog=documentation.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help=source)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / default_out, metavar="DIR",
                        help=f"folder of the cohort (default: data/{default_out})")
    if draws:
        parser.add_argument("--seed", type=int, default=0, metavar="N",
                            help="draws the splits (default: 0)")
    parser.add_argument("--force", action="store_true", help="make it again where it is there")
    parser.add_argument("--python", metavar="PYTHON",
                        help="a Python that has what is needed (default: a private environment "
                        "under target/python, made when missing)")
    return parser


def inside(arguments, extra: dict[str, str] | None = None) -> None:
    """Goes on in an environment that has numpy, pyarrow and `extra`, as the same command."""
    if os.environ.pop(INSIDE, None) is None:
        python = common.python_with(REQUIREMENTS | (extra or {}), arguments.python)
        os.execve(python, [python, *sys.argv], os.environ | {INSIDE: "1"})


def make(arguments, made_with: dict, split_with: dict, convert, split) -> None:
    """Makes the cohort, or only its splits where all else is there; says what was done.

    `convert(folder)` writes everything but the splits and returns lines of a summary.
    `split(folder)` returns the split of every subject and more lines. A cohort that was made with
    the same `made_with` keeps its data, so that going on to the next fold takes a moment.
    """
    out = arguments.out.absolute()
    made_with = {"script": _script()} | made_with
    if out.exists():
        _check_ours(out)
    summary = None if arguments.force else _read_summary(out, made_with)
    if summary is not None and summary["split_with"] == split_with:
        say("nothing to do: the cohort is there")
    elif summary is not None:
        say("the data are there: making the splits")
        splits, lines = split(out)
        # Until both are there, the summary says that the splits are to be made.
        _write_summary(out, summary | {"split_with": None})
        _write_splits(out, splits)
        summary |= {"split_with": split_with, "split_lines": lines}
        _write_summary(out, summary)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            folder = Path(scratch) / "cohort"
            folder.mkdir()
            lines = convert(folder)
            splits, split_lines = split(folder)
            _write_splits(folder, splits)
            summary = {"made_with": made_with, "split_with": split_with, "lines": lines,
                       "split_lines": split_lines}
            _write_summary(folder, summary)
            for path in folder.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            if out.exists():
                shutil.move(out, Path(scratch) / "old")
            folder.rename(out)
    for line in summary["lines"] + summary["split_lines"]:
        say(line)
    print(arguments.out)


class Events:
    """The rows of `data/`. Within a subject and a time, rows keep the order they are added in."""

    def __init__(self, *path_columns: str):
        self.path_columns = path_columns
        self._columns = {name: [] for name in (
            "subject_id", "time", "code", "numeric_value", "unit", "site", *path_columns)}

    def __len__(self) -> int:
        return len(self._columns["code"])

    def add(self, subject: int, time_us: int | None, code: str, value: float | None = None,
            unit: str | None = None, *, site: str, **paths: str) -> None:
        """One row; `time_us` since 1970-01-01, None for a static one. `paths` are relative to
        the cohort."""
        columns = self._columns
        columns["subject_id"].append(subject)
        columns["time"].append(time_us)
        columns["code"].append(code)
        columns["numeric_value"].append(value)
        columns["unit"].append(unit)
        columns["site"].append(site)
        for name in self.path_columns:
            columns[name].append(paths.get(name))

    def write(self, folder: Path, codes: dict, dataset: dict) -> None:
        """`data/`, `metadata/codes.parquet` with those of `codes` that occur, `dataset.json`."""
        import numpy
        import pyarrow

        types = {"subject_id": pyarrow.int64(), "time": pyarrow.timestamp("us"),
                 "numeric_value": pyarrow.float32()}
        table = pyarrow.table({
            name: pyarrow.array(values, types.get(name, pyarrow.string()))
            for name, values in self._columns.items()
        })
        static = [time is None for time in self._columns["time"]]
        times = [time or 0 for time in self._columns["time"]]
        order = numpy.lexsort((times, ~numpy.array(static), self._columns["subject_id"]))
        table = table.take(order)
        subjects = table["subject_id"].to_numpy()
        starts = numpy.flatnonzero(numpy.r_[True, subjects[1:] != subjects[:-1]])
        firsts = starts[::SUBJECTS_PER_SHARD].tolist()
        for shard, (first, end) in enumerate(zip(firsts, firsts[1:] + [len(table)])):
            write_table(folder / "data" / f"{shard}.parquet", table.slice(first, end - first))

        used = set(self._columns["code"])
        missing = used - set(codes)
        if missing:
            raise AssertionError(f"codes without a description: {sorted(missing)}")
        codes = {code: entry for code, entry in codes.items() if code in used}
        write_table(folder / "metadata" / "codes.parquet", pyarrow.table({
            "code": pyarrow.array(codes, pyarrow.string()),
            "description": pyarrow.array([d for d, _ in codes.values()], pyarrow.string()),
            "parent_codes": pyarrow.array(
                [parents or None for _, parents in codes.values()],
                pyarrow.list_(pyarrow.string())),
        }))
        dataset = {
            **dataset,
            "meds_version": "0.4.1",
            "code_modifier_columns": ["unit"],
            "site_id_columns": ["site"],
        } | ({"additional_value_modality_columns": list(self.path_columns)}
             if self.path_columns else {})
        (folder / "metadata" / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n")

    def line(self) -> str:
        """How many rows there are, by the site they come from."""
        import collections

        by_site = collections.Counter(self._columns["site"])
        return f"{len(self):,} events: " + ", ".join(
            f"{count:,} {site}" for site, count in by_site.most_common())


def birth_us(age_years: float, at_us: int = INDEX_US) -> int:
    """Midnight of a birthday that gives this age at `at_us`. Who is 57 in whole years is, on
    average, 57.5: the day is put half a year before."""
    days = round((age_years + (0.5 if age_years == int(age_years) else 0.0)) * DAYS_PER_YEAR)
    return at_us // DAY_US * DAY_US - days * DAY_US


def write_labels(folder: Path, task: str, column: str, rows: list[tuple]) -> None:
    """`labels/<task>/`: rows `(subject, prediction_time_us, value)`, the value in `column`."""
    import pyarrow

    types = {"boolean_value": pyarrow.bool_(), "integer_value": pyarrow.int64(),
             "float_value": pyarrow.float32(), "categorical_value": pyarrow.string()}
    rows = sorted(rows)
    write_table(folder / "labels" / task / "0.parquet", pyarrow.table({
        "subject_id": pyarrow.array([row[0] for row in rows], pyarrow.int64()),
        "prediction_time": pyarrow.array([row[1] for row in rows], pyarrow.timestamp("us")),
        column: pyarrow.array([row[2] for row in rows], types[column]),
    }))


def write_survival(folder: Path, task: str, rows: list[tuple]) -> None:
    """`survival/<task>/`: rows `(subject, prediction_time_us, duration_days, event)`."""
    import pyarrow

    rows = sorted(rows)
    write_table(folder / "survival" / task / "0.parquet", pyarrow.table({
        "subject_id": pyarrow.array([row[0] for row in rows], pyarrow.int64()),
        "prediction_time": pyarrow.array([row[1] for row in rows], pyarrow.timestamp("us")),
        "duration_days": pyarrow.array([row[2] for row in rows], pyarrow.float32()),
        "event": pyarrow.array([row[3] for row in rows], pyarrow.int32()),
    }))


def read_labels(folder: Path, task: str) -> dict[int, object]:
    """The value of each subject's last label."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "labels" / task / "0.parquet")
    return dict(zip(table["subject_id"].to_pylist(), table[table.column_names[2]].to_pylist()))


def read_subjects(folder: Path) -> list[int]:
    import pyarrow.compute
    import pyarrow.parquet

    subjects = set()
    for file in (folder / "data").rglob("*.parquet"):
        column = pyarrow.parquet.read_table(file, columns=["subject_id"])["subject_id"]
        subjects.update(pyarrow.compute.unique(column).to_pylist())
    return sorted(subjects)


def drawn_order(subjects, *name) -> list:
    """The subjects in an order drawn by `name` (a purpose, a seed), the same on every machine."""
    def key(subject) -> bytes:
        return hashlib.sha256(" ".join(map(str, (*name, subject))).encode()).digest()

    return sorted(subjects, key=key)


def draw_share(subjects, share: float, strata: dict, *name) -> set[int]:
    """About `share` of the subjects, drawn by `name` in each stratum by itself; `strata` has the
    stratum of a subject (a label, or nothing)."""
    by_stratum: dict = {}
    for subject in drawn_order(subjects, *name):
        by_stratum.setdefault(strata.get(subject), []).append(subject)
    # Rounding every small stratum by itself could leave none: what is owed is carried on, over
    # the strata in a drawn order.
    drawn, owed = set(), 0.0
    for stratum in drawn_order(by_stratum, *name, "strata"):
        owed += share * len(by_stratum[stratum])
        count = min(round(owed), len(by_stratum[stratum]))
        drawn.update(by_stratum[stratum][:count])
        owed -= count
    return drawn


def split_line(splits: dict[int, str]) -> str:
    counts = {name: sum(split == name for split in splits.values()) for name in SPLITS}
    return "splits: " + ", ".join(
        f"{count:,} {name} ({count / len(splits):.1%})" for name, count in counts.items())


def label_line(task: str, labels: dict, splits: dict[int, str], noun: str = "with the event") -> str:
    """How many labels there are and how many are true, in all and by split."""
    by_split = [(name, [value for subject, value in labels.items() if splits[subject] == name])
                for name in SPLITS]
    return (f"{task}: {len(labels):,} labels, {sum(labels.values()):,} {noun} ("
            + ", ".join(f"{name} {sum(values):,} of {len(values):,}" for name, values in by_split)
            + ")")


class Source:
    """The files of a folder, a tar archive (of any compression Python reads) or a zip archive."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            self._open = {
                file.relative_to(path).as_posix(): file.read_bytes
                for file in sorted(path.rglob("*")) if file.is_file()
            }
        elif not path.exists():
            raise Error(f"{path}: no such file or folder")
        elif zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            self._open = {
                str(PurePosixPath(name)): lambda name=name: archive.read(name)
                for name in sorted(archive.namelist()) if not name.endswith("/")
            }
        elif tarfile.is_tarfile(path):
            # A compressed archive is read once from its beginning: seeking in it would unpack it
            # again for every file.
            with tarfile.open(path) as archive:
                contents = {
                    str(PurePosixPath(member.name)): archive.extractfile(member).read()
                    for member in archive if member.isfile()
                }
            self._open = {name: lambda name=name: contents[name] for name in sorted(contents)}
        else:
            raise Error(f"{path} is no folder, no tar and no zip archive")

    def names(self) -> list[str]:
        return list(self._open)

    def read(self, name: str) -> bytes:
        return self._open[name]()

    def text(self, name: str) -> io.StringIO:
        return io.StringIO(self.read(name).decode("utf-8-sig"), newline="")

    def ending(self, suffix: str) -> list[str]:
        """Names whose last parts are those of `suffix`, such as `control/control_1.csv`."""
        return [name for name in self._open if f"/{name}".endswith(f"/{suffix}")]

    def one(self, suffix: str) -> str:
        found = self.ending(suffix)
        if len(found) != 1:
            raise Error(f"{self.path} has {len(found)} files {suffix}, and one is needed")
        return found[0]


def digest_of(*contents: bytes) -> str:
    """A SHA-256 for `made_with`, so that other files under the same name are told apart."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def write_table(path: Path, table) -> None:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _write_splits(folder: Path, splits: dict[int, str]) -> None:
    import pyarrow

    subjects = sorted(splits)
    with _replacing(folder / "metadata" / "subject_splits.parquet") as path:
        write_table(path, pyarrow.table({
            "subject_id": pyarrow.array(subjects, pyarrow.int64()),
            "split": pyarrow.array([splits[subject] for subject in subjects], pyarrow.string()),
        }))


def _write_summary(folder: Path, summary: dict) -> None:
    with _replacing(folder / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")


@contextmanager
def _replacing(path: Path):
    """A name beside `path` that takes its place once it is written."""
    scratch = path.with_name(f".{path.name}.new")
    yield scratch
    with open(scratch, "rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _read_summary(out: Path, made_with: dict) -> dict | None:
    """The summary of a cohort that is there and has the same data."""
    if not out.exists() or not any(out.iterdir()):
        return None
    summary = json.loads((out / "summary.json").read_text())
    if summary.get("made_with") != made_with:
        raise Error(f"{out} was made from other files, with other options or by another version: "
                    "pass --force to make it again, or choose another --out")
    return summary


def _check_ours(out: Path) -> None:
    """Anything but an empty folder and a cohort of this script is not ours to replace."""
    try:
        made_with = json.loads((out / "summary.json").read_text())["made_with"]
        ours = made_with["script"] == _script()
    except (OSError, ValueError, KeyError, TypeError):
        ours = out.is_dir() and not any(out.iterdir())
    if not ours:
        raise Error(f"{out} exists and is no cohort of this script: remove it or choose another "
                    "--out")


def _script() -> str:
    return Path(sys.argv[0]).name
