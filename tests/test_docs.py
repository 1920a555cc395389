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


@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # PEFT, of a model without a name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.filterwarnings(
    "ignore:(You are trying to modify a model|Already found a `peft_config`)"
)  # as the page says
def test_peft():
    pytest.importorskip("peft")
    count, names = run_examples("peft.md")
    assert count == 6
    for losses in names["losses"].values():
        assert losses[-1] < losses[0] - 0.05
    assert names["tokens"].shape[0] == 3
    assert names["same"]
