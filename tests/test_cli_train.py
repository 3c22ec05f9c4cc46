"""`ovisnb merge` as it is typed."""

from __future__ import annotations

import pytest

import ovisnb
from ovisnb.cli import main
from tests.train.test_lora import TINY, logits, opened, steps


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model, processor, batch = opened(use_dora=True)
    steps(model, batch)
    folder = ovisnb.save(model, processor, tmp_path_factory.mktemp("adapter") / "final")
    return folder, batch, logits(model, batch)


@pytest.mark.parametrize(
    "words",
    [
        ["--model_path", "ADAPTER"],
        ["--adapter_path", "ADAPTER"],
        ["--model_path", "ADAPTER", "--base_model", str(TINY), "--layout", "released", "--dtype", "float32"],
        ["--model_path", str(TINY), "--adapter_path", "ADAPTER"],
        ["--adapter_path", "ADAPTER", "--base_model_path", str(TINY)],
    ],
)
def test_merge_writes_one_model_and_prints_its_folder(words, adapter, tmp_path, capsys):
    folder, batch, expected = adapter
    words = [str(folder) if word == "ADAPTER" else word for word in words]
    assert main(["merge", *words, "--output_dir", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    model, _ = ovisnb.load(tmp_path / "merged")
    assert (logits(model, batch) - expected).abs().max() < 1e-4


def test_what_cannot_be_merged_is_one_sentence_and_exit_code_1(adapter, tmp_path, capsys):
    assert main(["merge", "--model_path", str(TINY), "--output_dir", str(tmp_path / "x")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("ovisnb: ") and "holds no adapter" in said.err and said.err.count("\n") == 1
    assert main(["merge", "--model_path", str(adapter[0]), "--output_dir", str(adapter[0])]) == 1
    assert "is not empty: choose an empty or a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output_dir", "x"], "give the adapter's folder: --model_path ADAPTER"),
        (["--model_path", "a"], "the following arguments are required: --output_dir"),
        (["--model_path", "a", "--output_dir", "x", "--layout", "vllm"], "invalid choice: 'vllm'"),
        (
            ["--model_path", "a", "--adapter_path", "b", "--base_model", "c", "--output_dir", "x"],
            "are three paths for two models",
        ),
    ],
)
def test_a_mistake_in_the_command_line_is_exit_code_2(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge", *words])
    assert stop.value.code == 2 and said in capsys.readouterr().err
