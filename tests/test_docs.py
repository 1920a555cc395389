"""The pages in docs/ keep their promises: every example runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_examples(page):
    """One after the other, with the names of those before."""
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S | re.M)
    names = {}
    for example in examples:
        exec(example, names)  # the page's own code
    return len(examples), names


def test_transformers():
    pytest.importorskip("transformers")
    count, names = run_examples("transformers.md")
    assert count == 3
    assert names["losses"][-1] < names["losses"][0]
    assert names["tokens"].shape[1] > 4
    assert names["out"].logits.shape == (4, 32, 64)
