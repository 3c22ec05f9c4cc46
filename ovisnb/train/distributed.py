"""A run in one process or many: that it is what was meant, that all stop together, that an error is said once.

accelerate runs one process where it was told two (`--cpu --num_processes 2`), and DistributedDataParallel where it
was told FSDP (on the CPU), without a word: `check_world` and `CleanStop` look, before a model is loaded and after the
Trainer has wrapped it.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ovisnb.train.configs import deepspeed_config, unused_parts, wanted_deepspeed, wants_fsdp
from ovisnb.train.settings import Settings, SettingsError

SAME_SIGNAL = 2.0  # seconds in which a signal that comes again is the same one, sent on by a launcher
_watching: list[Any] = []  # who takes signals now
_locks: set[int] = set()  # descriptors of run folders that are held now


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop and did, with a checkpoint; arguments: exit code (130 or 143) and a sentence."""


def rank() -> int:
    """This process's number among all of the run, also before a process group is there."""
    return int(os.environ.get("RANK", "0"))


def check_world(settings: Settings) -> int:
    """How many processes this run has, by its launcher; raises SettingsError where they are not those that were meant.

    A process that no launcher started becomes a world of one for DeepSpeed, which knows no other way.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise SettingsError(
            "accelerate launch was told several processes and started one, as it does with --cpu: "
            "use torchrun --nproc_per_node, or accelerate launch --multi_gpu."
        )
    if settings.num_processes not in (None, world):
        raise SettingsError(
            f"num_processes is {settings.num_processes}, and here {'is' if world == 1 else 'are'} {world}: "
            f"start it with torchrun --nproc_per_node {settings.num_processes} -m ovisnb train, or change num_processes."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not getattr(settings, precision, False):
        raise SettingsError(
            f"accelerate launch was told --mixed_precision {precision}, and the settings say nothing of it: give "
            f"--{precision} to ovisnb train."
        )
    fsdp = wants_fsdp(settings)
    if fsdp and wanted_deepspeed(settings) is not None:
        raise SettingsError("fsdp and deepspeed are both asked for: choose one.")
    if fsdp and not torch.cuda.is_available():
        raise SettingsError(
            "fsdp needs GPUs, and on the CPU accelerate would run DistributedDataParallel in its place: use deepspeed zero3."
        )
    if fsdp and "RANK" not in os.environ:
        raise SettingsError("fsdp needs a launcher: start it with torchrun --nproc_per_node N -m ovisnb train.")
    deepspeed = deepspeed_config(settings, world)  # raises what is wrong with it
    if rank() == 0:
        for sentence in unused_parts(settings):
            print(sentence)
    if deepspeed is not None and "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
        atexit.register(finish)
    return world


@contextmanager
def words_of_its_own() -> Iterator[None]:
    """Give back what accelerate puts into the environment: the process's next run would take it for a launcher's word."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def join(arguments: TrainingArguments) -> None:
    """Start DeepSpeed's own communication where DeepSpeed is used: accelerate does so on GPUs only.

    Without it ZeRO-3 cuts the weights, as they are loaded, for a world of one.
    """
    if arguments.deepspeed:
        import deepspeed

        # of the names of collectives that DeepSpeed calls, told again in every step
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        backend = "nccl" if arguments.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def check_wrapper(trainer: Trainer, settings: Settings) -> str:
    """What the run runs under, in words, once the Trainer has prepared its model.

    Raises SettingsError unless the number of processes and the wrapper are those that the settings ask for.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wrapped = trainer.model_wrapped
    wrapped = getattr(wrapped, "_orig_mod", wrapped)  # of torch.compile
    name, found = type(wrapped).__name__, distributed.get_world_size() if distributed.is_initialized() else 1
    if found != world or trainer.accelerator.num_processes != world:
        raise SettingsError(
            f"The launcher started {world} processes, and {found} train together: check how it was started."
        )
    config = deepspeed_config(settings, world)
    if config is not None:
        stage = config["zero_optimization"]["stage"]
        right = name == "DeepSpeedEngine" and wrapped.zero_optimization_stage() == stage
        wanted = told = f"DeepSpeed ZeRO-{stage}"
    elif wants_fsdp(settings):
        right, wanted, told = isinstance(wrapped, FSDPModule), "FSDP2", "FSDP2"
    elif world > 1:
        right, wanted, told = isinstance(wrapped, DistributedDataParallel), "DistributedDataParallel", "DDP"
    else:
        right, wanted, told = name != "DeepSpeedEngine" and not isinstance(wrapped, FSDPModule), "one process", ""
    if not right:
        raise SettingsError(
            f"The settings ask for {wanted}, and the model was wrapped as {name}: check how it was started."
        )
    return f"{world} {'processes' if world > 1 else 'process'}" + (f", {told}" if told else "")


class CleanStop(TrainerCallback):
    """Ends a run at the end of a step after SIGTERM or SIGINT came to any of its processes, with a checkpoint.

    with stop.watching():
        trainer.train()
    stop.raise_if_stopped()

    A second signal, later than SAME_SIGNAL seconds after the first, ends the process at once.
    """

    def __init__(self, trainer: Trainer, settings: Settings):
        self.trainer, self.settings = trainer, settings
        self.signal = 0
        """The signal that came to this process, or 0."""
        self.agreed = 0
        """The signal that came to any process, known to all of them at the same step; or 0."""
        self.step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        told = check_wrapper(self.trainer, self.settings)
        if state.is_world_process_zero and told != "1 process":
            print(f"training in {told}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        came = self.signal
        if args.world_size > 1:
            seen = torch.tensor([came], device=args.device)
            distributed.all_reduce(seen, op=distributed.ReduceOp.MAX)
            came = int(seen)
        if came and state.global_step < state.max_steps:  # the last step is the end anyhow
            self.agreed, self.step = came, state.global_step
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self) -> None:
        """Raise Stopped if the run ended because a signal came."""
        if self.agreed:
            name = signal.Signals(self.agreed).name
            sentence = f"stopped by {name} after step {self.step}: checkpoint-{self.step} is whole, and the same command goes on"
            raise Stopped(128 + self.agreed, sentence)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT; only the main thread can, and elsewhere nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = (signal.SIGTERM, signal.SIGINT)
        first = 0.0

        def come(number: int, frame: Any) -> None:
            nonlocal first
            if not self.signal:
                self.signal, first = number, time.monotonic()
                if rank() == 0:
                    print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)
            elif time.monotonic() - first > SAME_SIGNAL:
                raise KeyboardInterrupt(128 + number)

        before = {number: signal.signal(number, come) for number in taken}
        _watching.append(self)
        try:
            with _ends_at_once(taken) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else nullcontext():
                yield
        finally:
            _watching.remove(self)
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _ends_at_once(taken: tuple[int, ...]) -> Iterator[None]:
    """End the process on a second signal, or on one after another rank has failed, also while it waits for others.

    Python runs no handler while the main thread waits in a collective, so a thread reads what came.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        first = None
        while data := os.read(read, 1):
            number, now = data[0], time.monotonic()
            if number not in taken:
                continue
            if _somebody_failed() or (first is not None and now - first > SAME_SIGNAL):
                sys.stdout.flush()
                os._exit(128 + number)
            first = now if first is None else first

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)  # the thread reads the end of the pipe
        thread.join(5)
        os.close(read)


def _apart() -> None:
    # Terminals and launchers signal whole groups; a DataLoader's worker that dies of it would end the run with an error.
    if _watching:
        os.setpgid(0, 0)


os.register_at_fork(after_in_child=_apart)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run folder, which exists, to this run; SettingsError while another trains into it. Rank 0 does it for all."""
    if rank() != 0:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(
                f"A run is training into {folder} now: wait for it, or choose another output_dir."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        with suppress(OSError):  # a DataLoader's workers may live on, and closing alone would leave them the lock
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        _locks.discard(descriptor)
        os.close(descriptor)


def _leave_locks() -> None:
    """In a process forked from a run, as a DataLoader's worker is: it outlives a killed run for seconds."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


def check_free(folder: Path) -> None:
    """SettingsError while another run trains into the folder, which exists."""
    with held(folder):
        pass


@contextmanager
def whole_weights(trainer: Trainer) -> Iterator[Any]:
    """The trained model, with a `state_dict` that holds every weight whole where they lie in parts; every rank enters.

    In parts (ZeRO-3, FSDP2) they are brought together in the memory of rank 0, and the others get nothing.
    """
    wrapped = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    in_parts = isinstance(wrapped, FSDPModule) or (
        type(wrapped).__name__ == "DeepSpeedEngine" and wrapped.zero_optimization_stage() == 3
    )
    if not in_parts:
        yield model
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model.state_dict = lambda *args, **kwargs: state  # what every writer of weights asks
    try:
        yield model
    finally:
        del model.state_dict


def says_error() -> bool:
    """Whether this process is the one to say what went wrong: the first of its world that asks.

    What the others then meet, such as a connection that was closed, follows from it.
    """
    store = _store()
    return store is None or store.add("ovisnb/failed", 1) == 1


def _somebody_failed() -> bool:
    store = _store()
    return store is not None and store.add("ovisnb/failed", 0) > 0


def _store() -> Any:
    """The store of torchrun's agent, which outlives every rank; None in a run without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return distributed.PrefixStore(
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            distributed.TCPStore(*where, is_master=False, timeout=timedelta(seconds=10)),
        )
    except RuntimeError:  # the agent is gone
        return None


@contextmanager
def member() -> Iterator[None]:
    """What one process of a launcher's keeps to: only rank 0 prints, an error is said once, all end together."""
    with ExitStack() as ends:
        if rank() != 0:
            ends.enter_context(redirect_stdout(ends.enter_context(open(os.devnull, "w", encoding="utf-8"))))
            warnings.simplefilter("ignore")
            logging.set_verbosity_error()
        try:
            yield
        except Stopped:
            finish()
            raise
        except Exception:
            if not says_error():
                raise SystemExit(1) from None
            raise
        finish()


def finish() -> None:
    """End this process's part of a run: all ranks have come this far, and nothing is left in a buffer.

    Left to the interpreter's end, a process group's threads can bring a finished rank down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
