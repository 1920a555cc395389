"""Runs a benchmark: measures, keeps the figures, draws and prints them.

A benchmark is a module with

    add_arguments(parser)                        its options
    measure(arguments, progress: Steps) -> dict  its figures, as JSON can hold them
    rows_of(figures) -> list[dict]               the lines of its CSV file
    tables_of(figures) -> list[Table]

and, if it has them,

    plot(path, figures)
    notes_of(figures) -> list[str]               what the tables do not say
    stem_of(arguments) -> str                    the name of its files; by default the name of the benchmark
"""

import argparse
from types import ModuleType

from rich.console import Console

from . import record, tables
from .progress import Steps


def run(name: str, benchmark: ModuleType, arguments: argparse.Namespace) -> None:
    console = Console()
    with Steps(console) as progress:
        figures = benchmark.measure(arguments, progress)
    stem = benchmark.stem_of(arguments) if hasattr(benchmark, "stem_of") else name
    path = record.results_folder(arguments) / f"{stem}.json"
    rows = [{"benchmark": name} | row for row in benchmark.rows_of(figures)]
    record.save(path, record.device_of(arguments), rows, **figures)
    for table in benchmark.tables_of(figures):
        tables.show(console, table)
    if hasattr(benchmark, "notes_of"):
        for note in benchmark.notes_of(figures):
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"figures: {path}", soft_wrap=True)
    if hasattr(benchmark, "plot"):
        benchmark.plot(path.with_suffix(".png"), figures)
        console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
