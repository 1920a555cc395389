"""README keeps its promises: the example runs, the commands are there for .ci/run."""

import re
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_example_runs(capsys):
    (example,) = re.findall(r"^```python\n(.*?)```", README, flags=re.S | re.M)
    names = {}
    exec(example, names)  # README's own code
    assert names["out"].shape == (2, 8, 256, 64)
    assert names["token"].shape == (2, 8, 1, 64)
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["prefix"].parameters())
    assert "32 rows a head" in capsys.readouterr().out


def test_commands_are_whole_lines():
    """.ci/run takes the test command from here."""
    commands = re.findall(r"^    (python3 -m venv .*)$", README, flags=re.M)
    assert [command.rsplit(" -m ", 1)[1] for command in commands] == ["bench demo", "pytest -n auto"]
    assert all(" -c constraints.txt " in command for command in commands)
