"""Writes the recorded figures into README.md, docs/ and a page per device, and draws their plots.

In README.md and docs/, the tables of a record go between the markers <!-- device/record --> and <!-- end -->; a marker
that lists rows, <!-- device/record | row | row -->, takes only those. The page of a device,
bench/results/<device>/README.md, has all its tables and plots. Everything comes from the JSON of the records.
"""

import argparse
import re
from pathlib import Path
from types import ModuleType

from rich.table import Table

from ..lib import record
from ..registry import BENCHMARKS

RESULTS = record.ROOT / "bench" / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing, but fail if a page is out of date")


def run(arguments: argparse.Namespace) -> None:
    written = [record.ROOT / "README.md", *sorted((record.ROOT / "docs").glob("*.md"))]
    pages = {path: with_figures(path.read_text(encoding="utf-8")) for path in written}
    pages |= {folder / "README.md": page_of(folder) for folder in sorted(RESULTS.iterdir())}
    old = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments.check:
        if old:
            names = ", ".join(str(path.relative_to(record.ROOT)) for path in old)
            raise SystemExit(f"{names}: not the recorded figures; run: python -m bench report")
        return
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for path in sorted(RESULTS.glob("*/*.json")):
        draw(path)
    print(f"{len(pages)} pages, {len(old)} of them changed; plots drawn anew")


def with_figures(text: str) -> str:
    """Returns a page whose parts between markers are taken from the records."""
    marked = r"(<!-- ([\w-]+/[\w-]+)((?: \| [^|\n]+)*) -->\n).*?(<!-- end -->)"
    return re.sub(marked, lambda m: m[1] + tables(RESULTS / m[2], m[3].split(" | ")[1:]) + m[4], text, flags=re.S)


def page_of(folder: Path) -> str:
    """Returns the page with all tables and plots of a device."""
    lines = [f"# Records: {folder.name}", "", "Written by `python -m bench report` from the JSON files beside it.", ""]
    for path in sorted(path for path in folder.glob("*.json") if _module(path) is not None):
        of_run = record.load(path)["environment"]
        where = f"{of_run['device']}, torch {of_run['torch']}, triton {of_run['triton']}"
        lines += [f"## {path.stem}", "", f"{of_run['date']}, commit {of_run['commit']}, {where}", ""]
        if path.with_suffix(".png").exists():
            lines += [f"![{path.stem}]({path.stem}.png)", ""]
        lines += [tables(path)]
    return "\n".join(lines)


def tables(path: Path, rows=()) -> str:
    """Returns the tables of a record in Markdown, with its notes; or only the rows whose first cell is in `rows`."""
    module = _module(path)
    if module is None:
        raise ValueError(f"the name of a record must begin with that of a benchmark that has tables, got {path.name!r}")
    figures = record.load(path)
    parts = [markdown(table, rows) for table in module.tables_of(figures)]
    if not rows and hasattr(module, "notes_of") and (notes := module.notes_of(figures)):
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    return "\n".join(parts)


def draw(path: Path) -> None:
    """Draws the plot of a record, if its benchmark has one."""
    module = _module(path)
    if hasattr(module, "plot"):
        module.plot(path.with_suffix(".png"), record.load(path))


def _module(path: Path) -> ModuleType | None:
    """Returns the benchmark that made a record, named by the first word of the file; None for other files."""
    return BENCHMARKS.get(path.stem.partition("-")[0])


def markdown(table: Table, rows=()) -> str:
    """Returns a table in Markdown, with its title above."""
    header, *cells = zip(*([column.header, *column.cells] for column in table.columns), strict=True)
    if missing := set(rows) - {row[0] for row in cells}:
        raise ValueError(f"a table must have the rows that a marker lists, got none for {sorted(missing)}")
    cells = [row for row in cells if not rows or row[0] in rows]
    marks = ["---" if i == 0 else "---:" for i in range(len(header))]
    lines = ["| " + " | ".join(row) + " |" for row in (header, marks, *cells)]
    return "\n".join([f"{table.title}:", "", *lines, ""])
