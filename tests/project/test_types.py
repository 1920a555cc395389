"""The types of the public functions: correct code of a user passes the type checker, wrong code does not."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USER_CODE = Path(__file__).with_name("user_code.py")


def errors_of(path):
    """Lines of a file that the type checker, with the settings of pyproject.toml, finds fault with, and its output."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.split(":") for line in result.stdout.splitlines() if ": error: " in line]
    assert (result.returncode != 0) == bool(lines), result.stdout + result.stderr
    assert all(Path(name).name == path.name for name, *_ in lines), result.stdout
    return [int(number) for _, number, *_ in lines], result.stdout


def test_user_code_has_no_type_error():
    numbers, output = errors_of(USER_CODE)
    assert numbers == [], output


def test_wrong_code_has_type_errors(tmp_path):
    """What is Any everywhere would pass the test above as well."""
    path = tmp_path / "wrong.py"
    path.write_text(
        "from ntk_kernels import NTKPrefix, ntk_attention\n"
        "ntk_attention('query', None, None)\n"
        "NTKPrefix(num_heads=2, head_dim=8).param_count() + 'a'\n"
    )
    numbers, output = errors_of(path)
    assert set(numbers) == {2, 3}, output


def test_user_code_runs(tmp_path):
    for package in ("transformers", "peft", "safetensors", "sklearn"):
        pytest.importorskip(package)
    runpy.run_path(str(USER_CODE))["tensors"](tmp_path / "state.safetensors")
