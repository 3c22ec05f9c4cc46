"""The command `ovisnb`: exit codes, one sentence for what the user can mend, and a traceback for a fault of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from ovisnb import cli, notebooks

CHECKPOINT = Path(__file__).parent / "golden" / "ovis2_5" / "checkpoint"


def complaint(capsys, *words: str) -> str:
    """The one line on stderr of a command that ends with exit code 1."""
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ovisnb: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("ovisnb: ").strip()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from ovisnb.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = ['torch', 'transformers', 'numpy', 'matplotlib', 'pydantic', 'PIL', 'papermill']\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("train", "infer", "run", "demo"))


def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "ovisnb"
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("ovisnb ")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trian"],
        ["infer", "--question", "?"],
        ["infer", "--request_type", "circle"],
        ["run"],
        ["run", "a.ipynb", "-p", "x"],
    ],
)
def test_a_mistake_in_the_command_line_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: ovisnb" in capsys.readouterr().err


def test_train_hands_its_words_to_settings_and_prints_the_run_folder(monkeypatch, tmp_path, capsys):
    import ovisnb.train

    config = tmp_path / "sft.json"
    config.write_text(json.dumps({"learning_rate": 0.5, "max_steps": 3}), encoding="utf-8")
    seen = []
    monkeypatch.setattr(
        ovisnb.train, "run_sft", lambda settings: seen.append(settings) or tmp_path / "run", raising=False
    )
    assert cli.main(["train", str(config), "--max_steps", "4", "--bf16"]) == 0
    (settings,) = seen
    assert (settings.learning_rate, settings.max_steps, settings.bf16) == (0.5, 4, True)
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"


def test_train_help_lists_every_setting_with_its_default(capsys):
    from ovisnb.train import Settings

    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, []) else f" ({json.dumps(field.default).strip(chr(34))})"
        assert f"  --{name}{default}" in printed


def test_train_refuses_a_misspelt_setting(capsys):
    assert "'learning_rate'" in complaint(capsys, "train", "--learnin_rate", "1")


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def test_infer_prints_the_answer_and_writes_json(picture, tmp_path, capsys):
    output = tmp_path / "deep" / "answer.json"
    words = ["--model_path", str(CHECKPOINT), "--image_path", str(picture), "--question", "What is it?"]
    assert cli.main(["infer", *words, "--max_new_tokens", "5", "--temperature", "0", "--output_json", str(output)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert list(result) == [
        "image_path", "question", "response", "parsed", "boxes", "points", "image_size", "problems", "usage",
    ]  # fmt: skip
    assert result["question"] == "What is it?" and result["image_path"] == str(picture)
    assert result["image_size"] == [64, 48]
    assert 1 <= result["usage"]["new_tokens"] <= 5
    assert set(result["parsed"]) == {"think_content", "answer_content"}
    assert capsys.readouterr().out == result["response"] + "\n"


def test_infer_asks_for_coordinates_and_writes_them_in_pixels(picture, tmp_path, monkeypatch, capsys):
    import ovisnb.generate

    calls = []

    class Inference:
        def __init__(self, model_path):
            calls.append(model_path)

        def grounding_inference(self, image, question, **options):
            calls.append((image, question, options))
            text = "<ref>left</ref><box>(0.250,0.500),(0.500,0.750)</box><point>(0.500,0.250)</point>"
            return ovisnb.generate.parse(text, image_size=(64, 48))

    monkeypatch.setattr(ovisnb.generate, "Ovis25Inference", Inference)
    output = tmp_path / "answer.json"
    words = ["--model_path", "owner/model", "--image_path", str(picture), "--question", "Find it", "--enable_thinking"]
    assert cli.main(["infer", *words, "--request_type", "box", "--output_json", str(output)]) == 0
    options = {"request_type": "box", "max_new_tokens": None, "temperature": None, "enable_thinking": True}
    assert calls == ["owner/model", (picture, "Find it", options)]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["boxes"] == [{"label": "left", "box": [0.25, 0.5, 0.5, 0.75], "pixels": [16.0, 24.0, 32.0, 36.0]}]
    assert [point["pixels"] for point in result["points"]] == [[32.0, 12.0]]


def test_infer_says_what_is_missing(picture, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["infer", "--question", "?", "--model_path", str(tmp_path / "empty"), "--image_path"]
    assert complaint(capsys, *words, str(tmp_path / "none.png")) == f"there is no picture {tmp_path / 'none.png'}"
    (tmp_path / "text.png").write_text("no pixels")
    assert complaint(capsys, *words, str(tmp_path / "text.png")).startswith(f"{tmp_path / 'text.png'} is no picture")
    assert str(tmp_path / "empty") in complaint(capsys, *words, str(picture))


def test_infer_replaces_no_picture(picture, tmp_path, capsys):
    before = picture.read_bytes()
    words = ["infer", "--question", "?", "--model_path", str(tmp_path), "--image_path", str(picture)]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--output_json", str(picture)])
    assert end.value.code == 2 and "which is no earlier report of this command" in capsys.readouterr().err
    assert picture.read_bytes() == before


def small_notebook(folder: Path) -> Path:
    cells = [
        nbformat.v4.new_code_cell("word: str = 'a'\ntimes: int = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(word * times)\nassert times < 9, 'too often'"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "small.ipynb")
    return folder / "small.ipynb"


def test_run_takes_parameters_of_the_declared_type(tmp_path, capsys):
    output = tmp_path / "out.ipynb"
    words = ["run", str(small_notebook(tmp_path)), "-p", "word", "12", "-p", "times", "3", "--output", str(output)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines() == ["121212", str(output.with_suffix(".html"))]


def test_run_says_in_one_sentence_why_it_failed(tmp_path, capsys):
    path, output = str(small_notebook(tmp_path)), str(tmp_path / "out.ipynb")
    assert "did you mean 'times'?" in complaint(capsys, "run", path, "-p", "time", "3", "--output", output)
    assert "it is int, such as 1" in complaint(capsys, "run", path, "-p", "times", "x", "--output", output)
    assert "there is no notebook" in complaint(capsys, "run", str(tmp_path / "no.ipynb"))
    failure = complaint(capsys, "run", path, "-p", "times", "9", "--output", output)
    assert failure.startswith("small.ipynb failed at In [3] with AssertionError: too often")


def test_demo_runs_its_notebooks_in_order_and_stops_at_the_first_failure(tmp_path, monkeypatch, capsys):
    seen = []

    def run(path, output, parameters):
        seen.append((path, output, dict(parameters)))
        if path.stem == "03_sft":
            raise notebooks.NotebookError("03_sft.ipynb failed")
        return output.with_suffix(".html")

    monkeypatch.setattr(notebooks, "run_notebook", run)
    monkeypatch.setattr(notebooks, "repository_root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    stale = tmp_path / "outputs" / "demo" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    assert complaint(capsys, "demo") == "03_sft.ipynb failed"
    assert not stale.exists()
    wanted = ["01_data", "02_masks", "03_sft"]
    assert seen == [
        (
            tmp_path / "notebooks" / f"{name}.ipynb",
            tmp_path / "outputs" / "demo" / f"{name}.ipynb",
            notebooks.DEMO[name],
        )
        for name in wanted
    ]
    assert list(notebooks.DEMO) == [*wanted, "04_lora", "06_grounding"]


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "train", lambda words: json.loads("no json"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["train"])


def test_a_missing_file_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "train", lambda words: os.listdir(tmp_path / "nowhere"))
    assert complaint(capsys, "train") == f"{tmp_path / 'nowhere'}: No such file or directory"


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    def stop(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", stop)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "ovisnb: stopped\n"


def started(*words, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "ovisnb.cli", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def many(tmp_path) -> Path:
    """A data file that takes some time."""
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho."}]
    rows = (json.dumps({"id": f"a{number}", "kind": f"{number}", "conversations": talk}) for number in range(20_000))
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    return tmp_path / "many.jsonl"


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_fault(buffered, many):
    many.write_text(many.read_text().replace("human", "hooman"))
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    words = ["data", "validate", many, "--show", 99_999]
    process = started(*words, stdout=subprocess.PIPE, env=environment)
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
    process = started("--version", stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""})
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_a_closed_stdout_is_none_to_print_to(many):
    assert started("data", "stats", many, preexec_fn=lambda: os.close(1)).communicate() == (None, "")


def test_a_full_stdout_is_named(many):
    with open("/dev/full", "w") as full:
        process = started("data", "stats", many, stdout=full)
    assert process.communicate()[1] == "ovisnb: what is printed cannot be written (No space left on device)\n"
    assert process.returncode == 1


def test_a_command_that_is_told_to_end_leaves_nothing_half(many, tmp_path):
    out = tmp_path / "out" / "big.jsonl"
    process = started("data", "convert", many, out)
    while not out.parent.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.communicate()[1] == "ovisnb: stopped\n" and process.returncode == 143
    assert os.listdir(out.parent) == []
