"""Shared parts of the benchmarks: tables that fit the screen, progress without a terminal, work in threads."""

import io
import threading

import pytest
import torch
from rich.console import Console
from rich.table import Table

from bench.lib import progress, record, tables, threads
from bench.registry import BENCHMARKS

RECORDS = sorted((record.ROOT / "bench" / "results").glob("*/*.json"))


def printed(show, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    show(console)
    return console.file.getvalue().splitlines()


def columns_of(lines: list[str], border: str) -> list[list[str]]:
    """Returns the text between the borders, column by column."""
    rows = [[cell.strip() for cell in line[1:-1].split(border)] for line in lines if line.startswith(border)]
    return [[cell for cell in column if cell] for column in zip(*rows, strict=True)]


def check_shows_all_of(table: Table, width: int) -> None:
    """Checks that the parts have every column once and the first in each, with whole figures, within the screen."""
    lines = printed(lambda console: tables.show(console, table), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert " ".join(lines).startswith(table.title) or "".join(table.title.split()) in "".join("".join(lines).split())
    others = list(table.columns[1:])
    for part in tables.parts(table, width):
        lines = printed(lambda console, part=part: console.print(part), width)
        (first, *headers), (labels, *figures) = columns_of(lines, "┃"), columns_of(lines, "│")
        assert " ".join(first) == table.columns[0].header
        assert "".join("".join(labels).split()) == "".join("".join(table.columns[0].cells).split())
        for header, cells in zip(headers, figures, strict=True):
            column = others.pop(0)
            assert " ".join(header) == column.header
            assert cells == [cell for cell in column.cells if cell]
    assert others == []


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_tables_of_every_record_on_a_narrow_screen(path):
    for table in BENCHMARKS[path.stem.partition("-")[0]].tables_of(record.load(path)):
        check_shows_all_of(table, 80)
        check_shows_all_of(table, 400)


def test_every_benchmark_has_a_record():
    assert {path.stem.partition("-")[0] for path in RECORDS} == set(BENCHMARKS)


def test_wide_cells_are_broken_and_not_cut():
    table = Table(title="A table")
    for header in ("a long name of rows", "a figure", "words"):
        table.add_column(header)
    table.add_row("a row " * 10, "1.234 ± 0.567", "x" * 100)
    lines = printed(lambda console: tables.show(console, table), 40)
    assert max(map(len, lines)) <= 40
    text = "".join(lines)
    assert text.count("x") == 100 and "1.234 ± 0.567" in text and "…" not in text


def test_progress_without_a_terminal():
    """Steps with a name get a line each; the others one for every tenth of the task."""

    def work(console):
        with progress.Steps(console) as steps:
            named, counted = steps.add_task("converting", total=2), steps.add_task("training", total=1000)
            for name in ("elu", "[taylor1]"):
                steps.advance(named, step=name)
            for _ in range(1000):
                steps.advance(counted)

    lines = [line.split(" s  ")[1] for line in printed(work, 80)]
    assert lines[:2] == ["converting: elu (1 of 2)", "converting: [taylor1] (2 of 2)"]
    assert lines[2:] == [f"training ({n:,} of 1,000)" for n in range(100, 1001, 100)]


def test_threads():
    """Each item gets its result, operations are not split meanwhile, and errors are raised."""
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=30)

    def work(item):
        both.wait()
        return torch.get_num_threads(), item**2

    assert dict(threads.each(work, range(4))) == {i: (1, i**2) for i in range(4)}
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        list(threads.each(lambda item: 1 // item, [1, 0]))
    assert torch.get_num_threads() == 2
