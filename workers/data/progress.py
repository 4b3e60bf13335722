"""The progress bar of a preparation, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.workers.data.prepare import OnProgress, PrepareProgress


@contextmanager
def progress_bar() -> Iterator[OnProgress | None]:
    """Yield a callback for `prepare` that draws on standard error; None where that is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[num_rows]} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing data", total=None, num_rows=0)

        def show(progress: PrepareProgress) -> None:
            bar.update(task, completed=progress.done_bytes, total=progress.total_bytes, num_rows=progress.num_rows)

        yield show
