"""Start two processes as torchrun does, with what they need, and show what they printed where they fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])  # pip installs a ninja there
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    "PATH": PATH,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(command: list[str], printed: Path, **environment: str) -> subprocess.Popen:
    """A process in a session of its own that writes all it prints into the file `printed`."""
    with printed.open("ab") as out:
        return subprocess.Popen(
            command, env=ENVIRONMENT | environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, printed: Path, limit: float = 600) -> tuple[int, str]:
    """(exit status, what it printed); the test fails after `limit` seconds."""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its ranks before it ends
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"nothing after {limit} seconds: it hangs\n{tail(printed)}", pytrace=False)
    return status, printed.read_text(errors="replace")


def tail(printed: Path, lines: int = 40) -> str:
    """The end of what was printed."""
    return "\n".join(printed.read_text(errors="replace").splitlines()[-lines:])


def needs_compiler() -> None:
    """Skip where DeepSpeed cannot compile the operator that it starts with."""
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool, path=PATH)]
    if missing:
        pytest.skip(f"DeepSpeed compiles an operator when it starts, and {' and '.join(missing)} is not there")
