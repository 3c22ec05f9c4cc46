"""The first process of a launched run: torchrun, that leaves an exit code behind.

    python -m ovisnb.train.supervise RUN_FOLDER PROCESSES

Started by `ovisnb.train.launch.launch`, and by nobody else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ovisnb.data.files import write_json
from ovisnb.train.launch import EXIT, SETTINGS, TOKEN

# How long torchrun waits for ranks that write a checkpoint before it kills them; Run.stop's timeout may be shorter.
SHUTDOWN_SECONDS = 3600


def main(folder: Path, processes: int) -> int:
    """Run `ovisnb train` in so many processes, and write and return the exit code of the first that failed, or 0."""
    code = 1
    signal.signal(signal.SIGTERM, _end)  # until torchrun takes it
    try:
        code = _run(folder, processes)
    except SystemExit as end:
        code = end.code
    finally:
        write_json({"token": os.environ[TOKEN], "code": code}, folder / EXIT)
    return code


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _run(folder: Path, processes: int) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # ranks say themselves what went wrong, in fewer lines
    words = ["--standalone", "--nproc_per_node", str(processes), "--shutdown_timeout", str(SHUTDOWN_SECONDS)]
    try:
        run.run(run.parse_args([*words, "-m", "ovisnb", "train", str(folder / SETTINGS)]))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        why = ", often for want of memory" if name == "SIGKILL" else ""
        print(f"ovisnb: rank {rank} was ended by {name}{why}", flush=True)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2])))
