"""Every module is named in CONTRIBUTING's map or in the guide's table, and what these name exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("ntk_kernels", "reference", "bench")


def on_the_map():
    """Paths of the map: each list of files stands under the name of its folder."""
    paths = set()
    for section in re.split(r"^#+ ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M):
        folder = re.match(r"`([\w/]+/)`\n", section)
        if folder:
            paths |= {folder[1]} | {folder[1] + name for name in re.findall(r"`(\w+\.py)`", section)}
    return paths


def in_the_guide():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    return set(re.findall(r"`((?:ntk_kernels|reference|tests|bench)/[\w/]*(?:\.py)?)`", guide))


def modules():
    """All but empty ones; a package that is named stands for its own __init__.py."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.stat().st_size]
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return {name.removesuffix("__init__.py") for name in names if not name.startswith("ntk_kernels/reference/")}


def test_every_module_is_named():
    missing = modules() - on_the_map() - in_the_guide()
    assert not missing


def test_every_name_exists():
    named = on_the_map()
    assert len(named) > 80
    assert not {name for name in named if not (ROOT / name).exists()}
