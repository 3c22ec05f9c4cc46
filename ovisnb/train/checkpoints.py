"""Checkpoints that are complete or absent.

    with writing(folder, step, accelerator, model) as checkpoint:
        ...                                  # every process writes its files into `checkpoint`
    rotate(folder, limit=2, best=3)          # only now may older ones go
    checkpoint = last_checkpoint(folder)     # the newest complete one

When all files of checkpoint-N lie on the disk, and not before, complete.json is put beside them: the names of all of
them and their sizes in bytes. Whatever ends a run before that (SIGKILL, a power cut, a full disk) leaves a folder
without it, which is passed over and removed before the next checkpoint is written; so is one that has lost a file
since, or part of one. Folders without complete.json are never continued from, whatever wrote them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

MARKER = "complete.json"
STATE = "trainer_state.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(OSError):
    """A part of the run folder that could not be written; one sentence, saying what is kept."""


def step_of(checkpoint: Path) -> int:
    """The N of checkpoint-N."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(folder: str | Path, tell: Callable[[str], Any] | None = print) -> Path | None:
    """The newest complete checkpoint-N of a run folder, or None; `tell` is told which newer ones are no good, and why."""
    faults = []
    for checkpoint in reversed(_numbered(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            break
        faults.append(f"{checkpoint.name} ({fault})")
    else:
        checkpoint = None
    if faults and tell:
        instead = f"the last complete one is {checkpoint.name}" if checkpoint else "no checkpoint is complete"
        tell(f"passed over in {folder}: {', '.join(faults)}; {instead}")
    return checkpoint


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint is not complete, in a few words; None for one that is."""
    marker = checkpoint / MARKER
    if not marker.exists():
        return "it was not written to its end"
    try:
        files = json.loads(marker.read_text(encoding="utf-8"))["files"]
        for name, size in files.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if (there := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {there:,} bytes in place of {size:,}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} cannot be read"
    return None


def mark_complete(checkpoint: Path) -> None:
    """Bring every file of a checkpoint to the disk and then put its names and sizes into complete.json."""
    files = {}
    for root, folders, names in os.walk(checkpoint):
        for name in names:
            path = Path(root) / name
            if path != checkpoint / MARKER:
                _to_disk(path)
                files[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
        _to_disk(Path(root))
        folders.sort()
    unfinished = checkpoint.parent / f".{checkpoint.name}-{MARKER}"  # not a file of the checkpoint, if it stays behind
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump({"files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, checkpoint / MARKER)
    finally:
        unfinished.unlink(missing_ok=True)
    _to_disk(checkpoint)
    _to_disk(checkpoint.parent)


@contextmanager
def writing(folder: str | Path, step: int, accelerator: Any, model: nn.Module) -> Iterator[Path]:
    """Write checkpoint-`step`: every process enters, and the first one marks it complete when all have left.

    Unfinished checkpoints in the folder are removed first. One that cannot be written ends in a WriteError, after what
    was written of it was removed.
    """
    folder = Path(folder)
    checkpoint = folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for other in _numbered(folder):
            if other == checkpoint or not (other / MARKER).exists():
                remove(other)
    accelerator.wait_for_everyone()
    with told_when_full(checkpoint, folder, takes=_size(folder, model)):
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            yield checkpoint
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                mark_complete(checkpoint)
        except BaseException:  # torch.distributed's CheckpointException is no Exception
            remove(checkpoint)
            raise


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; its complete.json goes first, so that a half removed one is never taken for a whole one."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(folder: str | Path, limit: int | None, best: int | None = None) -> None:
    """Remove the oldest checkpoints beyond `limit` (None: none), damaged ones first.

    The newest complete one is never removed, and neither is that of step `best`.
    """
    there = _numbered(folder)
    complete = [checkpoint for checkpoint in there if fault_of(checkpoint) is None]
    if limit is None or not complete:
        return
    for checkpoint in there[: there.index(complete[-1])]:
        if checkpoint not in complete:
            remove(checkpoint)
    for checkpoint in [one for one in complete[:-1] if step_of(one) != best][: max(len(complete) - limit, 0)]:
        remove(checkpoint)


@contextmanager
def told_when_full(path: Path, folder: Path, takes: int | None = None) -> Iterator[None]:
    """Turn a failure to write `path`, something in the run folder, into a WriteError that says what is kept.

    `takes`: about how many bytes `path` will have. Without it other things are done meanwhile, and only the errors of
    a full disk are meant.
    """
    free = shutil.disk_usage(_existing(folder)).free
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = _cannot_write(error, anything=takes is not None)
        if reason is None:
            raise
        last = last_checkpoint(folder, tell=None)
        need = "" if takes is None else f"it takes about {_bytes(takes)}, "
        kept = f"{last.name} is complete and kept" if last else "no checkpoint was complete yet"
        raise WriteError(
            f"{path} could not be written ({reason}): {need}{_bytes(free)} were free; {kept}, and the same command "
            f"{'continues from it' if last else 'starts anew'} once there is space."
        ) from error


def _size(folder: Path, model: nn.Module) -> int:
    """About how many bytes the next checkpoint takes: what the last one took, or weights and Adam's two moments."""
    if last := last_checkpoint(folder, tell=None):
        return sum(json.loads((last / MARKER).read_text(encoding="utf-8"))["files"].values())
    return bytes_of(model) + 2 * sum(_bytes_of(weight) for weight in model.parameters() if weight.requires_grad)


def bytes_of(model: nn.Module) -> int:
    """Size of the weights that are saved: of a model with adapters only theirs."""
    adapters = hasattr(model, "peft_config")
    return sum(_bytes_of(weight) for weight in model.parameters() if weight.requires_grad or not adapters)


def _bytes_of(weight: nn.Parameter) -> int:
    return getattr(weight, "ds_numel", weight.numel()) * weight.element_size()  # ZeRO-3's are empty here


def _numbered(folder: str | Path) -> list[Path]:
    """Every checkpoint-N, complete or not, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in found if path.name.removeprefix("checkpoint-").isdigit()), key=step_of)


def _cannot_write(error: Exception, anything: bool) -> str | None:
    """What the system says of a failed writing, in a few words; None for an error of another kind.

    `anything`: every OSError, because nothing else than writing was done; otherwise one of a full disk.
    """
    if isinstance(error, OSError):
        meant = not isinstance(error, WriteError) and (anything or error.errno in _FULL)
        return (error.strerror or str(error)) if meant else None
    said = " ".join(str(error).split())
    if isinstance(error, SafetensorError) and ("I/O" in said or "os error" in said):
        return said
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in said or "inline_container" in said):
        return "torch could not write to the end"  # it does not say why
    if isinstance(error, CheckpointException):
        return "a process could not write its part"
    return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else _existing(folder.absolute().parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
