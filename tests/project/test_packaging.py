"""What an installation holds: the modules of ntk_kernels and reference, tuned tiles, the marker of types, nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the build reads."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "results")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    return folder


def contents_of_wheel(checkout):
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, check=True)
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return sorted(name for name in file.namelist() if ".dist-info/" not in name)


def expected():
    package = ROOT / "ntk_kernels"
    paths = [*(path for end in ("*.py", "*.cpp", "tuned/*.json") for path in package.rglob(end)), package / "py.typed"]
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return sorted(names | {f"ntk_kernels/reference/{path.name}" for path in (ROOT / "reference").glob("*.py")})


def test_wheel(checkout):
    assert contents_of_wheel(checkout) == expected()


def test_wheel_of_a_checkout_without_links(checkout):
    """As git checks a link out where there are none (Windows): a file with the name of the target."""
    link = checkout / "ntk_kernels" / "reference"
    assert link.is_symlink()
    link.unlink()
    link.write_text("../reference")
    assert contents_of_wheel(checkout) == expected()
