"""Shared by all plots: figures and axes, ticks at powers of two, saving."""

from collections.abc import Iterable
from pathlib import Path


def canvas(columns: int = 1, rows: int = 1, *, width: float = 7, height: float = 5) -> tuple:
    """Returns a figure and the list of its axes, row by row, each of this size in inches."""
    import matplotlib  # here, so that benchmarks without a plot start sooner

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = columns * width, rows * height
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def mark(axis, values: Iterable[int]) -> None:
    """Sets the ticks of `axes.xaxis` or `axes.yaxis` at these numbers, labelled as 512, 1k, 64k."""
    values = list(values)
    axis.set_ticks(values, [short(value) for value in values])
    axis.set_ticks([], minor=True)


def plain_log(axis) -> None:
    """Labels a logarithmic axis at 1, 2, 5, 10, 20 ..."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_ticks([], minor=True)


def short(value: int) -> str:
    return f"{value // 1024}k" if value and value % 1024 == 0 else f"{value:,}"


def save(figure, path: Path) -> None:
    """Saves a figure as PNG, with a grid and, in axes that have labels, a small legend.

    A legend of more than six labels would cover curves, so it goes below the axes.
    """
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        labels = axes.get_legend_handles_labels()[1]
        if labels and axes.get_legend() is None:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3} if len(labels) > 6 else {}
            axes.legend(fontsize=8, **below)
    figure.savefig(path, dpi=110)
    plt.close(figure)
