"""README keeps its promises: the example runs, the commands are there for .ci/run."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run(capsys):
    """The second goes on with the names of the first."""
    first, second = re.findall(r"^```python\n(.*?)```", README, flags=re.S | re.M)
    names = {}
    exec(first, names)  # README's own code
    assert names["state"].num_rows == 32
    assert names["out"].shape == (2, 8, 256, 64)
    exec(second, names)
    assert names["out"].shape == (2, 8, 256, 64)
    assert names["token"].shape == (2, 8, 1, 64)
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["prefix"].parameters())
    assert "32 rows a head" in capsys.readouterr().out


def test_commands_are_whole_lines():
    """.ci/run takes the test command from here."""
    commands = re.findall(r"^    (python3 -m venv .*)$", README, flags=re.M)
    assert [command.rsplit(" -m ", 1)[1] for command in commands] == ["bench demo", "pytest -n auto"]
    assert all(" -c constraints.txt " in command for command in commands)


def test_first_figures_are_the_recorded_ones():
    """What the first paragraphs promise, which no marker keeps up to date."""
    record = json.loads((ROOT / "bench" / "results" / "cpu" / "prompt.json").read_text(encoding="utf-8"))
    results = {result["in_place"]: result for result in record["results"]}
    without, exact, rows, trained = (
        results[name] for name in ("no prompt", "the prompt", "128 rows", "128 rows, trained")
    )

    def kept(result):
        lost, gained = (sum(without["losses"]) - sum(other["losses"]) for other in (result, exact))
        return f"{lost / gained:.0%}"

    start = re.sub(r"\s+", " ", README[: README.index("```python")])
    assert f"a prompt of {exact['rows']:,} tokens" in start
    assert f"take **{rows['bytes'] / 2**20:.1f} MiB instead of {exact['bytes'] / 2**20:.0f}**" in start
    assert f"read **{exact['ms'] / rows['ms']:.1f} times as fast**" in start
    assert f"**{kept(rows)}** of what" in start
    assert f"**{kept(trained)}** after" in start

    record = json.loads((ROOT / "bench/results/nvidia-h200/attention-prefix64k.json").read_text(encoding="utf-8"))
    times = {name: time["ms"] for name, time in record["milliseconds"]["forward"].items() if time}
    rows = record["settings"]["prefix_rows"]
    ratio = times[f"SDPA over a prefix of {rows:,} rows"] / times["ours, torch backend"]
    assert f"a prefix of {rows:,} rows takes {ratio:.0f} times as long" in start
