"""A run while it goes on: its lines as they come, and its loss drawn anew."""

from __future__ import annotations

import time
from typing import Any

from .runs import show_run

REDRAW = 2.0  # seconds between two drawings, at least


def watch(run: Any, every: float = 0.5) -> None:
    """Print what a run prints and draw its loss until it ends; `run` is of `ovisnb.train.launch`.

    It looks every `every` seconds. An interrupt (the stop button) ends the looking, not the run. Under papermill, and
    in a page made of the notebook, the lines and the last picture stay. Raises RunError, with the run's own sentence,
    if the run failed.
    """
    handle, drawn, at = None, 0, 0.0
    try:
        while True:
            ended = not run.running  # before the lines are read, so that none comes after the last look
            for line in run.lines():
                print(line, flush=True)
            size = _size(run)
            if size != drawn and (ended or time.monotonic() - at > REDRAW):
                handle, drawn, at = _draw(run, handle), size, time.monotonic()
            if ended:
                break
            time.sleep(every)
    except KeyboardInterrupt:
        print(
            f"the run goes on (process {run.pid}): watch(Run.attach({str(run.folder)!r})) shows it again, and "
            "run.stop() ends it with a checkpoint"
        )
        return
    run.check()


def _size(run: Any) -> int:
    path = run.folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def _draw(run: Any, handle: Any) -> Any:
    """Show the curves, in the place of the last ones; the handle of that place, None where nothing can be shown."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        return None
    try:
        plot = show_run(run.folder)
    except (ValueError, FileNotFoundError):  # no loss yet, or a line half written
        return handle
    if handle is None:
        return display(plot, display_id=True)
    handle.update(plot)
    return handle
