"""Prints tables of any width: columns that do not fit on the screen follow below, and no figure is cut."""

import textwrap

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_FRAME = 3  # character cells that a column takes beside its text: a line and two blanks


def show(console: Console, table: Table) -> None:
    """Prints a table's title and its parts."""
    if table.title:
        console.print(Text(table.title, style="italic"))
    for part in parts(table, console.width):
        console.print(part)


def parts(table: Table, width: int) -> list[Table]:
    """Splits a table into tables that are at most `width` wide, each of which repeats the first column.

    Headers break between words, the first column where the widest of the others leaves it too little room. Other cells
    break only if one alone is wider than the screen.
    """
    first, *others = table.columns
    room = width - 1 - _FRAME  # of the first column and, with their frames, of the others
    widest = max((_narrow(column) + _FRAME for column in others), default=0)
    label = min(_wide(first), max(room - widest, room // 5))
    groups, left = [[]], room - label
    for column in others:
        needed = min(_narrow(column), room - label - _FRAME)
        if groups[-1] and needed + _FRAME > left:
            groups.append([])
            left = room - label
        groups[-1].append(column)
        left -= needed + _FRAME
    return [_part(table, label, group, room - label) for group in groups]


def _part(table: Table, label: int, group: list[Column], room: int) -> Table:
    """A table of the first column, `label` wide, and those of the group, which have `room`."""
    first = table.columns[0]
    part = Table()
    part.add_column(first.header, justify=first.justify, width=label, overflow="fold")
    widths = [_wide(column) for column in group]
    if sum(widths) + _FRAME * len(group) > room:
        widths = [min(_narrow(column), room - _FRAME) for column in group]
    for column, width in zip(group, widths, strict=True):
        header = "\n".join(textwrap.wrap(column.header, width))
        part.add_column(header, justify=column.justify, width=width, overflow="fold")
    rows = zip(*(column.cells for column in (first, *group)), strict=True)
    for row, cells in zip(table.rows, rows, strict=True):
        part.add_row(*cells, end_section=row.end_section)
    return part


def _wide(column: Column) -> int:
    """The width of a column with its header on one line."""
    return max(map(cell_len, (column.header, *column.cells)))


def _narrow(column: Column) -> int:
    """The width of a column with its header on as many lines as it has words."""
    return max(map(cell_len, (*column.header.split(), *column.cells)))
