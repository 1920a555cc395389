"""Records: the files that a run writes, with what it was measured on, and the options that all benchmarks share."""

import argparse
import csv
import datetime
import json
import math
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # by name on command lines
_IN_EVERY_ROW = ("date", "commit", "device", "driver", "torch", "triton", "ntk_kernels")  # columns of a CSV file
ROOT = Path(__file__).resolve().parents[2]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """Returns the GPU's name in lower case with dashes, or "cpu"."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the device and for the folder of the figures."""
    parser.add_argument("--device", type=_device, default=default_device(), help="cpu or cuda (default: %(default)s)")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the folder of the figures."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", help="folder for the figures (default: a folder in bench/out/)")
    where.add_argument(
        "--record", action="store_true", help="write to bench/results/, the records that the project keeps"
    )


def device_of(arguments: argparse.Namespace) -> str:
    """The device that a benchmark runs on; the CPU for one that has no such option."""
    return getattr(arguments, "device", "cpu")


def results_folder(arguments: argparse.Namespace, name: str | None = None) -> Path:
    """Returns the folder for a run's figures, which it makes if need be. `name` replaces the device's in its path."""
    name = device_name(device_of(arguments)) if name is None else name
    folder = ROOT / "bench" / ("results" if arguments.record else "out") / name
    if arguments.out is not None:
        folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def positive(number: type):
    """Returns an argparse type: a positive int or float."""

    def parse(text: str):
        value = number(text)
        if value <= 0 or math.isnan(value):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = number.__name__  # argparse puts it into "invalid int value"
    return parse


def power_of_two(minimum: int):
    """Returns an argparse type: a power of two that is at least `minimum`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < minimum or number.bit_count() != 1:
            raise argparse.ArgumentTypeError(f"must be a power of two from {minimum}, got {text}")
        return number

    parse.__name__ = "int"  # argparse puts it into "invalid int value"
    return parse


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not available: {str(error).splitlines()[0]}") from None
    return text


def environment(device: str) -> dict:
    """Returns date, versions, commit and processor, the header of every record."""

    def version_of(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    def git(*arguments):
        try:
            return subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            return None

    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device) if torch.device(device).type == "cuda" else _processor(),
        "driver": _driver() if torch.device(device).type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "ntk_kernels": version_of("ntk-kernels"),
        "commit": git("rev-parse", "--short=10", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "ntk_kernels", "reference", "bench/*.py")),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(path: Path, device: str, rows: list[dict], **figures) -> None:
    """Writes a record: the environment and the figures as JSON, and `rows`, with the environment, as CSV beside it.

    Rows need not have the same columns.
    """
    of_run = environment(device)
    record = {"environment": of_run} | figures
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    rows = [{name: of_run[name] for name in _IN_EVERY_ROW} | row for row in rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> dict:
    """Returns the content of a record's JSON file."""
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
