"""`ovisnb plan`: what a run would take, from the settings that `ovisnb train` takes."""

from __future__ import annotations

import json

import pytest

from ovisnb.cli import main


@pytest.fixture
def config(golden, tmp_path):
    file = tmp_path / "sft.json"
    limits = {"multimodal_max_length": 120, "text_max_length": 60, "single_image_max_pixels": 4096}
    file.write_text(json.dumps({"model_path": str(golden / "checkpoint"), "single_image_min_pixels": 1024, **limits}))
    return str(file)


def test_it_prints_the_parts_and_the_cards(config, capsys):
    assert main(["plan", config, "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("memory of one GPU, planned (one process)\n  weights ")
    assert "120 tokens" in said and "peak" in said
    assert "fits on a GPU of: 24 GiB yes, 40 GiB yes, 80 GiB yes, 141 GiB yes" in said
    assert "what saves most" not in said


def test_it_says_what_to_change_for_a_card(config, capsys, monkeypatch):
    few = [({"gradient_checkpointing": True}, ""), ({"freeze_vision_tower": True}, "")]
    monkeypatch.setattr("ovisnb.train.savings._changes", lambda *of: few)
    assert (
        main(["plan", config, "--gpu_memory", "1", "--per_device_train_batch_size", "2", "--freeze_vision_tower"]) == 0
    )
    said = capsys.readouterr().out
    assert "memory of one process on the CPU" in said or "memory of one GPU" in said
    assert "fits on a GPU of: 1 GiB no" in said
    changes = said.partition("what saves most, each alone:\n")[2].splitlines()
    assert any("--gradient_checkpointing true: saves " in line for line in changes)
    assert not any("freeze_vision_tower true" in line for line in changes)  # it is on


def test_processes_are_a_setting(config, capsys):
    assert main(["plan", config, "--num_processes", "2", "--deepspeed", "zero3", "--device", "cuda"]) == 0
    assert "planned (2 processes, DeepSpeed ZeRO-3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gradient_checkpoint", "true"], "gradient_checkpointing"),
        (["--model_path", "nowhere"], "nowhere"),
        (["--optim", "no_such"], "no_such"),
        (["--bf16", "--fp16"], "bf16 and fp16"),
    ],
)
def test_bad_settings_are_one_sentence(config, words, said, capsys):
    assert main(["plan", config, *words]) == 1
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_mistakes_in_its_own_flags(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", config, "--gpu_memory", "none"])
    assert stopped.value.code == 2 and "--gpu_memory: 'none' is no number of GiB above 0" in capsys.readouterr().err
    assert main(["plan"]) == 1
    assert "give model_path, or llm_name_or_path" in capsys.readouterr().err


def test_its_help_names_settings_and_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--gpu_memory GIB" in said and "--gradient_checkpointing" in said and "CONFIG.json" in said
