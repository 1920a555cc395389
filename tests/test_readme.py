"""README keeps its promises: the example runs, the files exist, the figures are the recorded ones."""

import re
import textwrap
from pathlib import Path

from bench import report

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run(capsys):
    """One after the other, with the names of those before."""
    examples = re.findall(r"^ *```python\n(.*?)```", README, flags=re.S | re.M)
    assert len(examples) == 2
    names = {}
    for example in examples:
        exec(textwrap.dedent(example), names)  # README's own code
    assert names["out"].shape == (2, 8, 256, 64)
    assert names["z"].grad.abs().sum() > 0
    assert names["k"].grad.abs().sum() > 0
    assert "128 rows a head" in capsys.readouterr().out


def test_files_exist():
    paths = re.findall(r"`((?:ntk_kernels|reference|tests|bench)/[\w/.]*)`", README)
    paths += re.findall(r"\]\(((?:bench|docs)/[^)]*)\)", README)
    assert len(paths) > 10
    for path in paths:
        assert path == "bench/out/" or (ROOT / path).exists(), path  # which the benchmarks make


def test_figures_are_the_recorded_ones():
    assert report.with_figures(README) == README
    assert len(re.findall("<!-- end -->", README)) == len(re.findall(r"<!-- [\w-]+/", README)) > 3


def test_commands_are_whole_lines():
    """.ci/run takes the test command from here."""
    commands = re.findall(r"^    (python3 -m venv .*)$", README, flags=re.M)
    assert [command.rsplit(" -m ", 1)[1] for command in commands] == ["bench demo", "pytest -n auto"]
    assert all(" -c constraints.txt " in command for command in commands)
