"""A run that kills itself: killed_worker.py SETTINGS.json EVENT.

EVENT counts what Python does to files and folders of the run folder (opening to write, renaming, removing, making):
at that one the process is gone, as by `kill -9`, in the middle of whatever it was writing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def watch(folder: Path, happens) -> None:
    """Call happens() before each change of a file or folder in `folder`, for as long as the process lives."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            changes = not flags & os.O_DIRECTORY and (
                flags & (os.O_WRONLY | os.O_RDWR) or set(mode or "") & set("wax+")
            )
        else:
            path, changes = arguments[0] if arguments else None, event in CHANGES
        if changes and isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(folder):
            happens()

    sys.addaudithook(hook)


def main(settings: str, event: int) -> None:
    from ovisnb.train import Settings, run_sft

    left = [event]

    def count() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    chosen = Settings.from_json(settings)
    watch(Path(chosen.output_dir), count)
    run_sft(chosen)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
