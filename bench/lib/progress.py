"""Progress of a benchmark: bars on a terminal, elsewhere a line for each finished step."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINES = 10  # of a task whose steps have no names


class Steps(Progress):
    """The progress of rich, which shows nothing where there is no terminal; this one then prints lines.

    Use it from one thread.
    """

    def __init__(self, console: Console):
        columns = TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._start = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1, step: str | None = None) -> None:
        """Counts steps of a task. Of those without a name, every tenth of the task gets a line."""
        task = self._tasks[task_id]
        before = task.completed
        super().advance(task_id, advance)
        if not self.disable:
            return
        tenths = [int(_LINES * done / task.total) if task.total else 0 for done in (before, task.completed)]
        if step is not None or tenths[0] < tenths[1]:
            what = task.description if step is None else f"{task.description}: {step}"
            seconds = time.monotonic() - self._start
            self.console.print(
                f"{seconds:5.0f} s  {what} ({task.completed:,g} of {task.total:,g})",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
