"""The pages (README, CONTRIBUTING, docs/) keep their promises: files exist, figures are the recorded ones, examples run."""

import re
from pathlib import Path

import pytest

from bench.upkeep import report

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:ntk_kernels|reference|tests|bench|docs)/[\w/.*-]*)`", text):
        assert path == "bench/out/" or any(ROOT.glob(path)), path  # which the benchmarks make
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


@each_page
def test_links_within_pages(page):
    """To headings, as GitHub names them."""
    for link, heading in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link if link else page).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", target, re.M)
        ]
        assert heading in headings, heading


def test_figures_are_the_recorded_ones():
    marked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert report.with_figures(text) == text
        assert text.count("<!-- end -->") == len(re.findall(r"<!-- [\w-]+/", text))
        marked += text.count("<!-- end -->")
    assert marked > 3


def test_the_guide_has_every_environment_variable():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ntk_kernels").rglob("*.py"))
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    in_table = re.findall(r"^\| `(NTK_KERNELS_\w+)` \|", guide, flags=re.M)
    assert sorted(in_table) == sorted(set(re.findall(r"\bNTK_KERNELS_[A-Z]+", code)))


def test_rows_of_a_table():
    """A marker may list rows; one that is not there is an error."""
    record = "nvidia-h200/attention-d128"
    text = report.with_figures(f"<!-- {record} | SDPA, no prefix | ours, torch backend -->\n<!-- end -->")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SDPA, no prefix", "| ours, torch backend"]
    with pytest.raises(ValueError, match=r"the rows that a marker lists, got none for \['theirs'\]"):
        report.with_figures(f"<!-- {record} | SDPA, no prefix | theirs -->\n<!-- end -->")


def run_examples(page):
    """One after the other, with the names of those before."""
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S | re.M)
    names = {}
    for example in examples:
        exec(example, names)  # the page's own code
    return len(examples), names


def test_guide():
    count, names = run_examples("guide.md")
    assert count == 1
    assert names["state"].num_rows == 128


def test_transformers():
    pytest.importorskip("transformers")
    count, names = run_examples("transformers.md")
    assert count == 4
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
