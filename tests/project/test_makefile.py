"""The checks that .ci/run makes are targets of the Makefile, whose triton versions are those that have a baseline."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dry_run():
    """Commands that the Makefile would run."""
    if shutil.which("make") is None:
        pytest.skip("needs make")

    def run(*targets):
        result = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_ci_run(dry_run):
    (targets,) = re.findall(r"^make (.*) PYTHON=", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    commands = dry_run(*targets.split())
    for module in ("ruff check .", "ruff format --check .", "mypy", "bench report --check", "bench gate"):
        assert f" -m {module}\n" in commands


def test_hooks(dry_run):
    for target in re.findall(r"entry: make (.*)", (ROOT / ".pre-commit-config.yaml").read_text()):
        dry_run(target)


def test_every_baseline_is_compared(dry_run):
    """One version of triton is the pinned one, which the target `static` has."""
    baselines = {path.stem.removeprefix("triton-") for path in (ROOT / "bench" / "baseline").glob("*.csv")}
    (pinned,) = re.findall(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    others = re.findall(r"install .* triton==(\S+)", dry_run("static-all"))
    assert sorted([pinned, *others]) == sorted(baselines)
