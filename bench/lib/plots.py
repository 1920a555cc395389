"""What all plots share: how they are made, how powers of two are written, how they are saved."""

from collections.abc import Iterable
from pathlib import Path


def canvas(columns: int = 1, rows: int = 1, *, width: float = 7, height: float = 5) -> tuple:
    """A figure and a list of its axes, row by row, each of that size in inches."""
    import matplotlib  # here, so that benchmarks without a plot start sooner

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = columns * width, rows * height
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def mark(axis, values: Iterable[int]) -> None:
    """Ticks of `axes.xaxis` or `axes.yaxis` at these numbers: 512, 1k, 64k."""
    values = list(values)
    axis.set_ticks(values, [short(value) for value in values])
    axis.set_ticks([], minor=True)


def plain_log(axis) -> None:
    """A logarithmic axis with 1, 2, 5, 10, 20 ... written out."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_ticks([], minor=True)


def short(value: int) -> str:
    return f"{value // 1024}k" if value and value % 1024 == 0 else f"{value:,}"


def save(figure, path: Path) -> None:
    """As PNG, with a grid and a small legend in all axes that have labels; a long one would cover curves, and goes
    below."""
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        labels = axes.get_legend_handles_labels()[1]
        if labels and axes.get_legend() is None:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 3} if len(labels) > 6 else {}
            axes.legend(fontsize=8, **below)
    figure.savefig(path, dpi=110)
    plt.close(figure)
