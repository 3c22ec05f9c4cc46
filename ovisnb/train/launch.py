"""A run in processes of its own, started from a notebook: it outlives the kernel, and another kernel can take it up.

    run = launch(Settings.from_dict({...}), processes=2, deepspeed="zero2")
    run = Run.attach("outputs/sft")          # after a restart of the kernel
    run.lines(), run.running, run.exit_code, run.wait(), run.stop()

The run folder (output_dir) then holds, besides what the run itself writes,
    launch.json            which process it is, and its command
    launch_settings.json   the settings it was started with
    log.txt                all that it printed; a run that goes on writes behind
    exit.json              its exit code, once it has ended
Nothing of `env` is written anywhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from ovisnb.data.files import write_json
from ovisnb.train.configs import deepspeed_config
from ovisnb.train.settings import Settings, SettingsError

LAUNCH, SETTINGS, LOG, EXIT = "launch.json", "launch_settings.json", "log.txt", "exit.json"
# What a launcher writes into a run folder before the run begins.
LAUNCHED = frozenset({LAUNCH, SETTINGS, LOG, EXIT})
TOKEN = "OVISNB_RUN"  # in the environment of every process of a run
SUPERVISE = [sys.executable, "-m", "ovisnb.train.supervise"]
STOPPED = (130, 143)
POLL = 0.2  # seconds


class RunError(RuntimeError):
    """A run that cannot be started or taken up, or that failed; the message is one sentence, the run's own if it has one."""


def launch(
    settings: Settings | Mapping[str, Any],
    processes: int = 1,
    *,
    deepspeed: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Start `ovisnb train` in `processes` processes of this machine, one for each GPU, and return at once.

    deepspeed: as the setting. env: variables for the run besides this process's own, such as keys of a service.
    Raises SettingsError for settings that cannot work, RunError if a run is going on in the same folder.
    """
    if processes < 1:
        raise RunError(f"processes is {processes}: a run has at least 1.")
    values = settings.to_dict() if isinstance(settings, Settings) else dict(settings)
    values["num_processes"] = processes
    if deepspeed is not None:
        values["deepspeed"] = deepspeed
    settings = Settings.from_dict(values)
    deepspeed_config(settings, processes)
    folder = Path(settings.output_dir).absolute()  # a notebook may go elsewhere meanwhile
    if not settings.resume and folder.exists() and any(path.name not in LAUNCHED for path in folder.iterdir()):
        raise SettingsError(f"{folder} is not empty and resume is false: choose another output_dir, or resume.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log, _locked(log):
        # two notebooks may start at once: who has the log looks, and writes launch.json, before the other can look
        if (folder / LAUNCH).exists() and (run := Run.attach(folder)).running:
            raise RunError(
                f"A run is going on in {folder} (process {run.pid}): Run.attach({str(folder)!r}) takes it up, and "
                "another output_dir starts a second one."
            )
        (folder / EXIT).unlink(missing_ok=True)
        write_json(settings.to_dict(), folder / SETTINGS)
        token = uuid.uuid4().hex
        command = [*SUPERVISE, str(folder), str(processes)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(processes) | dict(env or {}) | {TOKEN: token},
            start_new_session=True,
        )
        made = {
            "pid": process.pid,
            "created": psutil.Process(process.pid).create_time(),
            "host": socket.gethostname(),
            "token": token,
            "command": command,
            "log_start": log.tell(),
        }
        write_json(made, folder / LAUNCH)
    run = Run(folder, made)
    run._process = process
    return run


class Run:
    """A run that was started by `launch`, by this process or another."""

    def __init__(self, folder: Path, made: Mapping[str, Any]):
        self.folder = folder
        self.pid: int = made["pid"]
        self._made = made
        self._process: subprocess.Popen | None = None
        self._read = made["log_start"]

    @classmethod
    def attach(cls, folder: str | Path) -> Run:
        """The run that was last started in a run folder; RunError if none was, or on another machine."""
        folder = Path(folder).absolute()
        try:
            made = json.loads((folder / LAUNCH).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"No run was launched in {folder}: it has no {LAUNCH}.") from None
        if made["host"] != socket.gethostname():
            raise RunError(f"The run in {folder} was launched on {made['host']}: attach to it there.")
        return cls(folder, made)

    def __repr__(self) -> str:
        code = self.exit_code
        state = "running" if code is None else "finished" if code == 0 else f"ended with exit code {code}"
        return f"Run({str(self.folder)!r}, {state})"

    @property
    def running(self) -> bool:
        """Whether any process of it lives."""
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 0: finished; 143 or 130: stopped, with a checkpoint; 1: it failed; 137: it was killed."""
        if self._process is not None:
            self._process.poll()  # or it would stay as a zombie
        if self._supervisor() is not None:
            return None
        with suppress(FileNotFoundError):
            written = json.loads((self.folder / EXIT).read_text(encoding="utf-8"))
            if written["token"] == self._made["token"]:
                return written["code"]
        return None if self._members() else 137

    def lines(self) -> list[str]:
        """The whole lines of log.txt that came since the last call; the first call gives all since the run began."""
        with (self.folder / LOG).open("rb") as log:
            log.seek(self._read)
            text, end, _ = log.read().rpartition(b"\n")
        self._read += len(text) + len(end)
        return text.decode("utf-8", errors="replace").splitlines() if end else []

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the run has ended; TimeoutError after `timeout` seconds."""
        begun = time.monotonic()
        while (code := self.exit_code) is None:
            if timeout is not None and time.monotonic() - begun > timeout:
                raise TimeoutError(f"The run in {self.folder} has not ended within {timeout} seconds.")
            time.sleep(POLL)
        return code

    def stop(self, timeout: float = 600.0) -> int:
        """Let the run end after its step, with a checkpoint, and return its exit code; kill it after `timeout` seconds.

        Every process of the run is asked; what is left of a run whose launcher was killed is stopped too.
        """
        if not self.running:
            return self.wait()
        supervisor = self._supervisor()
        for process in [supervisor] if supervisor is not None else self._members():
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        with suppress(TimeoutError):
            return self.wait(timeout)
        for process in self._members():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return self.wait()

    def check(self) -> None:
        """Raise RunError, with the sentence that the run ended with, if it failed."""
        code = self.exit_code
        if code in (None, 0, *STOPPED):
            return
        text = (self.folder / LOG).read_bytes()[self._made["log_start"] :].decode("utf-8", errors="replace")
        said = [line.removeprefix("ovisnb: ") for line in text.splitlines() if line.startswith("ovisnb: ")]
        last = said or [line for line in text.splitlines() if line.strip()] or ["it printed nothing"]
        raise RunError(f"The run in {self.folder} ended with exit code {code}: {last[-1]} (see {self.folder / LOG})")

    def _supervisor(self) -> psutil.Process | None:
        """The process that was started, if it lives; another that got its number later is not it."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self._made["created"] and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def _members(self) -> list[psutil.Process]:
        """Every living process of the run, known by its environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(TOKEN) == self._made["token"] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


@contextmanager
def _locked(file: IO) -> Iterator[None]:
    """Alone with a file; let go by name, as a child that has inherited the file would keep it locked."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _environment(processes: int) -> dict[str, str]:
    """This process's environment, in which the run finds this package, DeepSpeed finds ninja, and CPUs are shared out."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]),
        "PYTHONUNBUFFERED": "1",
    }
