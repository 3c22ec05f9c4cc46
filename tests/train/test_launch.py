"""Runs in processes of their own: found again, watched from another kernel, stopped, refused a second time."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from ovisnb.train import Settings, SettingsError
from ovisnb.train import launch as launch_module
from ovisnb.train.checkpoints import last_checkpoint
from ovisnb.train.launch import EXIT, LAUNCH, LOG, SETTINGS, Run, RunError, launch

WRITES = "import json,os,sys; from pathlib import Path; folder = Path(sys.argv[1])\n"
ENDS = "(folder / 'exit.json').write_text(json.dumps({'token': os.environ['OVISNB_RUN'], 'code': %d}))\n"
LIMIT = 600


@pytest.fixture
def stands_in(monkeypatch):
    """Let launched runs be a few lines of Python in place of a training; every one is ended."""

    def put(code):
        monkeypatch.setattr(launch_module, "SUPERVISE", [sys.executable, "-u", "-c", WRITES + code])

    begun = []
    popen = launch_module.subprocess.Popen
    monkeypatch.setattr(
        launch_module.subprocess, "Popen", lambda *args, **options: begun.append(popen(*args, **options)) or begun[-1]
    )
    yield put
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def settings(tmp_path):
    return Settings.from_dict({"model_path": "m", "data_path": "d.json", "output_dir": str(tmp_path / "run")})


def until(true, what):
    """Wait for a condition; the test fails if it takes too long."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < LIMIT, f"waited in vain for {what}"
        time.sleep(0.05)


def says(run, text):
    until(lambda: text in (run.folder / LOG).read_text() or not run.running, text)
    assert text in (run.folder / LOG).read_text()


def test_what_a_launch_leaves(stands_in, settings):
    stands_in("print('key', len(os.environ['SECRET_KEY'])); print('half', end='')\n" + ENDS % 0)
    run = launch(settings, 2, deepspeed="zero1", env={"SECRET_KEY": "xyzzy-1"})
    assert run.wait(LIMIT) == 0 and not run.running
    assert run.lines() == ["key 7"] and run.lines() == []  # a line is given when it is whole
    given = Settings.from_json(run.folder / SETTINGS)
    assert (given.num_processes, given.deepspeed) == (2, "zero1")
    assert not [path for path in run.folder.rglob("*") if path.is_file() and b"xyzzy-1" in path.read_bytes()]
    again = Run.attach(run.folder)
    assert (again.pid, again.exit_code, again.lines()) == (run.pid, 0, ["key 7"])
    assert repr(again).endswith("run', finished)")
    again.check()


def test_a_second_run_in_the_same_folder_is_refused(stands_in, settings):
    stands_in("import time; time.sleep(1000)")
    run = launch(settings)
    with pytest.raises(RunError, match=rf"A run is going on in .* \(process {run.pid}\): Run.attach"):
        launch(settings)
    assert Run.attach(run.folder).running and "running" in repr(run)
    with pytest.raises(TimeoutError, match=r"has not ended within 0.01 seconds"):
        run.wait(0.01)
    assert run.stop() == 137  # what stands in writes no exit code
    stands_in(ENDS % 0)
    assert launch(settings).wait(LIMIT) == 0
    with pytest.raises(SettingsError, match="num_processes"):
        launch(settings.to_dict() | {"num_proceses": 1})
    with pytest.raises(RunError, match="processes is 0"):
        launch(settings, 0)
    with pytest.raises(SettingsError, match="zero9 is no file and none of the shipped"):
        launch(settings, deepspeed="zero9")


def test_a_new_run_is_not_the_last_ones(stands_in, settings):
    stands_in("print('first')\n" + ENDS % 1)
    first = launch(settings)
    assert first.wait(LIMIT) == 1
    stands_in("print('second')\n" + ENDS % 0)
    second = launch(settings)
    assert second.wait(LIMIT) == 0
    assert second.lines() == Run.attach(second.folder).lines() == ["second"]
    assert (second.folder / LOG).read_text() == "first\nsecond\n"


def test_a_run_is_found_when_its_notebook_has_gone_elsewhere(stands_in, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    stands_in("print('here')\n" + ENDS % 0)
    run = launch(settings.to_dict() | {"output_dir": "run"})
    again = Run.attach("run")
    monkeypatch.chdir("elsewhere")
    assert run.wait(LIMIT) == again.wait(LIMIT) == 0
    assert run.lines() == again.lines() == ["here"]


def test_a_failed_run_says_why(stands_in, settings):
    stands_in("print('step 1'); print('ovisnb: there is no picture a.png'); print('noise')\n" + ENDS % 1)
    run = launch(settings)
    assert run.wait(LIMIT) == 1
    with pytest.raises(RunError, match=r"ended with exit code 1: there is no picture a\.png \(see .*log\.txt\)$"):
        Run.attach(run.folder).check()


def test_a_number_of_another_process_is_not_the_run(stands_in, settings):
    stands_in(ENDS % 0)
    run = launch(settings)
    run.wait(LIMIT)
    made = json.loads((run.folder / LAUNCH).read_text())
    made["pid"] = os.getpid()
    (run.folder / LAUNCH).write_text(json.dumps(made))
    assert Run.attach(run.folder).exit_code == 0
    (run.folder / EXIT).unlink()
    assert Run.attach(run.folder).exit_code == 137
    (run.folder / LAUNCH).write_text(json.dumps(made | {"host": "elsewhere"}))
    with pytest.raises(RunError, match="was launched on elsewhere: attach to it there"):
        Run.attach(run.folder)
    with pytest.raises(RunError, match=f"No run was launched in .*: it has no {LAUNCH}"):
        Run.attach(run.folder / "nowhere")


def test_ranks_without_their_launcher_are_still_the_run(stands_in, settings):
    rank = "[sys.executable, '-c', 'import time; time.sleep(1000)']"
    stands_in(f"import subprocess, time; subprocess.Popen({rank}); print('begun'); time.sleep(1000)")
    run = launch(settings)
    says(run, "begun")
    psutil.Process(run.pid).kill()
    until(lambda: run._supervisor() is None, "the launcher to end")
    assert run.running
    assert run.stop() == 137 and not run.running


def test_a_run_in_two_processes_stops_with_a_checkpoint(toy):
    run = launch(toy(max_steps=10_000, save_steps=0, dataloader_num_workers=1, per_device_train_batch_size=1), 2)
    says(run, "step 2/10000")
    assert run.stop(LIMIT) == 143
    checkpoint = last_checkpoint(run.folder)
    step = int(checkpoint.name.partition("-")[2])
    text = (run.folder / LOG).read_text()
    assert text.count("stopped by SIGTERM") == 1
    assert f"ovisnb: stopped by SIGTERM after step {step}: checkpoint-{step} is whole" in text
    assert "Traceback" not in text and not (run.folder / "final").exists()
    run.check()


def test_a_run_outlives_its_kernel(toy, tmp_path):
    values = toy(max_steps=40, save_steps=0, per_device_train_batch_size=1).to_dict()
    (tmp_path / "sft.json").write_text(json.dumps(values))
    begins = (
        "import json; from ovisnb.train.launch import launch\n"
        f"run = launch(json.load(open({str(tmp_path / 'sft.json')!r}))); print(run.pid)"
    )
    first, client = start_new_kernel()
    try:
        client.execute_interactive(begins, timeout=LIMIT, output_hook=lambda message: None)
        run = Run.attach(tmp_path / "run")
        says(run, "step 1/40")
    finally:
        client.stop_channels()
        first.signal_kernel(signal.SIGKILL)
        first.shutdown_kernel(now=True)
    assert run.running

    watches = (
        "from ovisnb.show import watch; from ovisnb.train.launch import Run\n"
        f"run = Run.attach({str(run.folder)!r}); watch(run); print('exit code', run.exit_code)"
    )
    shown = []
    second, client = start_new_kernel()
    try:
        client.execute_interactive(watches, timeout=LIMIT, output_hook=shown.append)
    finally:
        client.stop_channels()
        second.shutdown_kernel(now=True)
    kinds = [message["msg_type"] for message in shown]
    text = "".join(message["content"]["text"] for message in shown if message["msg_type"] == "stream")
    assert "exit code 0" in text, shown
    assert "step 1/40" in text and "step 40/40" in text  # what came before it looked, too
    assert kinds.count("display_data") == 1  # drawn in one place
    assert (run.folder / "final").is_dir()
