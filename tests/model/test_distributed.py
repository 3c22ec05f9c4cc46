"""Two processes with unlike batches, such as one without any picture: neither hangs, and both get the joined batch's
gradient."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root

from ovisnb.chat import collate
from ovisnb.model import load
from tests.train.together import ENVIRONMENT, PATH, TORCHRUN

from . import distributed_worker as worker


def train_together(kind: str, folder: Path, limit: float) -> list[tuple[dict, dict]]:
    """(what it ran under, its tensors) of each of two processes; fails, with what they printed, after `limit` seconds."""
    printed = folder / "printed.txt"
    with open(printed, "wb") as out:
        process = subprocess.Popen(
            [*TORCHRUN, worker.__file__, kind, str(folder)],
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"nothing after {limit} seconds: it hangs"
            built = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
            if locks := list(Path(built).rglob("lock")):  # a killed compiler leaves its lock
                status += f"; perhaps for {locks[0]} of an earlier run, which may then be removed"
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers before it ends
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        tail = "\n".join(printed.read_text(errors="replace").splitlines()[-40:])
        pytest.fail(f"{kind}: {status}\n{tail}", pytrace=False)
    return [
        (json.loads((folder / f"{rank}.json").read_text()), load_file(folder / f"{rank}.safetensors"))
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def alone(golden):
    """What the worker writes, by one process that sees both ranks' samples as one batch."""
    model, processor = load(golden / "checkpoint", dtype=torch.float32)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=worker.LEARNING_RATE)
    written = {}
    steps = worker.samples(processor)
    for step, per_rank in enumerate(steps):
        optimizer.zero_grad()
        model(**collate([sample for encoded in per_rank for sample in encoded]), use_cache=False).loss.backward()
        written |= {f"{step}/{name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    model.eval()
    with torch.no_grad():
        evaluated = [model(**collate(encoded), use_cache=False).loss for encoded in steps[0]]
    return written, evaluated


def check(ranks, alone) -> None:
    written, evaluated = alone
    for rank, (_, tensors) in enumerate(ranks):
        torch.testing.assert_close(tensors.pop("evaluated"), evaluated[rank])
    (_, first), (_, second) = ranks
    assert first.keys() == second.keys() == written.keys()  # every parameter has a gradient in every step
    for name, wanted in written.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(
            first[name], wanted, rtol=1e-3, atol=1e-6, msg=lambda told, name=name: f"{name}: {told}"
        )
    head = "model.vision_tower.head_linear.weight"
    seen = [bool(first[f"{step}/{head}"].any()) for step in range(len(worker.STEPS))]
    assert seen == [kinds != ("text", "text") for kinds in worker.STEPS]


def test_a_batch_without_pictures_trains_under_ddp(tmp_path, alone):
    ranks = train_together("ddp", tmp_path, limit=600)
    assert [seen for seen, _ in ranks] == [{"world_size": 2, "wrapper": "DistributedDataParallel", "stage": None}] * 2
    check(ranks, alone)


def test_a_batch_without_pictures_trains_under_fsdp(tmp_path, alone):
    ranks = train_together("fsdp", tmp_path, limit=600)
    wrapper = "FSDPOvis2_5ForConditionalGeneration"
    assert [seen for seen, _ in ranks] == [{"world_size": 2, "wrapper": wrapper, "stage": None}] * 2
    check(ranks, alone)


def test_a_batch_without_pictures_trains_under_zero3(tmp_path, alone):
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool, path=PATH)]
    if missing:
        pytest.skip(f"DeepSpeed compiles an operator when it starts, and {' and '.join(missing)} is not there")
    # the operator is compiled once, into torch's cache of extensions: minutes on a slow machine
    ranks = train_together("zero3", tmp_path, limit=600)
    assert [seen for seen, _ in ranks] == [{"world_size": 2, "wrapper": "DeepSpeedEngine", "stage": 3}] * 2
    check(ranks, alone)
