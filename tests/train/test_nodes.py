"""The launch files for several machines: they parse, they suit their schema, and two launchers on this machine meet."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from ovisnb.train.callbacks import read_metrics
from ovisnb.train.configs import CONFIGS, SHIPPED

from .together import finish, start

NODES = CONFIGS / "nodes"
SCHEMA = Path(__file__).resolve().parents[1] / "golden" / "skypilot" / "task_schema.json"
SHELL = ["torchrun.sh", "slurm.sbatch"]


@pytest.mark.parametrize("name", SHELL)
def test_shell_files_parse(name):
    checked = subprocess.run(["bash", "-n", str(NODES / name)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and not checked.stderr


def test_the_cloud_task_suits_the_schema_of_skypilot():
    schema = json.loads(SCHEMA.read_text())
    task = yaml.safe_load((NODES / "skypilot.yaml").read_text())
    checker = jsonschema.validators.validator_for(schema)(schema)
    checker.validate(task)
    with pytest.raises(jsonschema.ValidationError):
        checker.validate(task | {"nodes": 2})
    for shell in (task["run"], task["setup"]):
        assert subprocess.run(["bash", "-n"], input=shell, text=True, check=False).returncode == 0


def test_the_page_names_every_file_and_what_they_name_is_there():
    page = (NODES / "README.md").read_text()
    files = {path.name for path in NODES.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    named = {name for file in NODES.iterdir() for name in re.findall(r"--deepspeed (\w+)", file.read_text())}
    assert named and named <= set(SHIPPED)


def test_two_launchers_meet_and_train_together(toy, tmp_path):
    settings = toy(max_steps=1, save_steps=0, per_device_train_batch_size=1, num_processes=2)
    file = tmp_path / "sft.json"
    file.write_text(json.dumps(settings.to_dict()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"NODES": "2", "PROCESSES": "1", "RENDEZVOUS": f"127.0.0.1:{port}"}
    command = ["bash", str(NODES / "torchrun.sh"), str(file)]
    printed = [tmp_path / f"node{number}.txt" for number in range(2)]
    nodes = [start(command, path, **told) for path in printed]
    ended = [finish(node, path) for node, path in zip(nodes, printed, strict=True)]
    assert [status for status, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
    assert sum("training in 2 processes, DDP" in text for _, text in ended) == 1
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["samples_seen"] == 2
