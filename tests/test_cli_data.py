"""The commands `ovisnb data ...`: exit codes, what they print and write, and that asking for help costs nothing."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ovisnb import cli, cli_data
from ovisnb.data import read_records
from ovisnb.data.checks.faults import KINDS
from ovisnb.data.sample import FORMS

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "data" / "photos"
CHECKPOINT = ROOT / "tests" / "golden" / "ovis2_5" / "checkpoint"


def run(capsys, *words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `ovisnb data ...`."""
    try:
        code = cli.main(["data", *map(str, words)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def talk(question: str, answer: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.fixture
def bad(tmp_path) -> Path:
    """A data file with five faults in three records and a broken line."""
    Image.effect_noise((80, 60), 90).convert("RGB").save(tmp_path / "good.png")
    rows = [
        json.dumps(talk("<image> a", "A.", id="good", image="good.png")),
        '{"id": ',
        json.dumps(talk("<image> b", "<think>B.", id="two\x1b[31m\u202e", image="none.png")),
        json.dumps({"id": "user", "conversations": [{"from": "user", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}),
        json.dumps(talk("<image> c", "<box>(0.9,0.1),(0.2,0.5)</box>", id="box", image="good.png")),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(rows))
    return path


def test_what_pillow_warns_of_is_not_printed_beside_the_report(tmp_path):
    Image.effect_noise((80, 60), 90).convert("RGB").save(tmp_path / "whole.tif")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:100])  # within its tables
    path = tmp_path / "one.json"
    path.write_text(json.dumps([talk("<image> a", "A.", id="cut", image="cut.tif")]))
    command = [sys.executable, "-m", "ovisnb.cli", "data", "validate", path, tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "cut.tif" in done.stdout and "Warning" not in done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from ovisnb.cli import main\n"
        "try:\n"
        "    main(['data', *sys.argv[1:], '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = ['torch', 'transformers', 'datasets', 'pyarrow', 'av']\n"
        "heavy += [] if sys.argv[1:] == ['validate'] else ['numpy', 'pydantic']\n"  # that reads the table of kinds
        "assert not [name for name in heavy if name in sys.modules]\n"
    )
    for words in ([], ["sample"], ["validate"], ["split"], ["convert"], ["stats"]):
        result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert "stats" in result.stdout


def test_the_help_of_validate_lists_every_kind(capsys):
    code, printed, _ = run(capsys, "validate", "--help")
    assert code == 0
    for kind, sentence in KINDS.items():
        assert kind in printed and sentence in printed
    assert cli_data._FORMS == ", ".join(FORMS)


def test_a_clean_file_is_exit_code_0(capsys):
    code, printed, said = run(capsys, "validate", PHOTOS / "photos.json", PHOTOS)
    assert (code, said) == (0, "") and "nothing wrong in 28 records" in printed


def test_faults_are_exit_code_1_and_one_json_entry_each(bad, tmp_path, capsys):
    code, printed, _ = run(capsys, "validate", bad, tmp_path, "--json", tmp_path / "faults.json")
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert code == 1 and "\x1b" not in printed and "\u202e" not in printed
    assert [(fault["kind"], fault["id"], fault["line"]) for fault in faults] == [
        ("broken_json", None, 2),
        ("unknown_role", "user", 4),
        ("unclosed_tag", "two\x1b[31m\u202e", 3),
        ("inverted_box", "box", 5),
        ("missing_file", "two\x1b[31m\u202e", 3),
    ]
    for fault in faults:
        assert f"{fault['kind']} (1): {KINDS[fault['kind']]}" in printed and fault["message"]


def test_ignored_kinds_do_not_count(bad, tmp_path, capsys):
    kinds = ["broken_json", "unknown_role", "unclosed_tag", "inverted_box", "missing_file"]
    assert run(capsys, "validate", bad, tmp_path, "--ignore", *kinds)[0] == 0
    assert run(capsys, "validate", bad, tmp_path, "--ignore", *kinds[:2], "--ignore", *kinds[2:])[0] == 0
    code, _, said = run(capsys, "validate", bad, tmp_path, "--ignore", "missing_fil")
    assert code == 2 and "did you mean 'missing_file'" in said


def test_fix_writes_a_copy_beside_the_file_and_leaves_the_file(bad, tmp_path, capsys):
    before = bad.read_bytes()
    code, printed, _ = run(capsys, "validate", bad, tmp_path, "--fix")
    assert code == 1 and bad.read_bytes() == before
    assert "3 records written, 2 of them repaired, 2 left out" in printed
    assert [record.id for record in read_records(tmp_path / "bad_clean.jsonl")] == ["good", "user", "box"]
    assert run(capsys, "validate", tmp_path / "bad_clean.jsonl", tmp_path)[0] == 0
    assert run(capsys, "validate", bad, tmp_path, "--fix")[0] == 1  # the copy is ours, and made anew


def test_fix_takes_a_name_that_is_free(bad, tmp_path, capsys):
    assert run(capsys, "validate", bad, tmp_path, "--fix", tmp_path / "ok.json")[0] == 1
    assert len(json.loads((tmp_path / "ok.json").read_text())) == 3
    code, _, said = run(capsys, "validate", bad, tmp_path, "--fix", bad)
    assert code == 1 and "is there already" in said
    code, _, said = run(capsys, "validate", "--fix", bad, tmp_path / "ok.json")  # the words in the wrong order
    assert code == 1 and "is there already" in said


def test_json_replaces_nothing_but_an_earlier_report(bad, tmp_path, capsys):
    (tmp_path / "info.json").write_text(json.dumps({"a": {"meta_file": "bad.jsonl", "image_dir": "."}}))
    (tmp_path / "list.json").write_text(json.dumps([{"kind": "find", "id": "a", **talk("Hi", "Ho.")}], indent=0))
    (tmp_path / "folder").mkdir()
    names = ("bad.jsonl", "good.png", "list.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    for command in ("validate", "stats"):
        for name in ("info.json", *names, "folder"):
            for file in (bad, tmp_path / "info.json"):
                code, printed, said = run(capsys, command, file, tmp_path, "--json", tmp_path / name)
                assert (code, printed) == (2, "") and f"{name}, which is no earlier report of this command" in said
    assert run(capsys, "validate", PHOTOS / "photos.json", PHOTOS, "--against", bad, "--json", bad)[0] == 2
    assert [(tmp_path / name).read_bytes() for name in names] == before
    report, good = tmp_path / "report.json", [PHOTOS / "photos.json", PHOTOS]
    for words in (["stats", *good], ["validate", *good], ["validate", bad, tmp_path]):
        report.write_text("")
        codes = {run(capsys, *words, "--json", report)[0] for _ in range(3)}
        assert len(codes) == 1 and 2 not in codes
    assert run(capsys, "validate", *good, "--json", report)[0] == 0 and json.loads(report.read_text()) == []
    assert run(capsys, "validate", bad, tmp_path, "--json", report)[0] == 1
    assert run(capsys, "stats", *good, "--json", report)[0] == 2


@pytest.mark.parametrize("held", [b"", b"[]", b"\x1f\x8bxx", b"PAR1xxxxPAR1", b'{"a": {"meta_file": "none.json"}}'])
def test_the_report_of_a_file_that_is_refused_holds_that_fault(held, tmp_path, capsys):
    path, report = tmp_path / "data.json", tmp_path / "report.json"
    path.write_bytes(held)
    for earlier in ("[]", None):  # None: that of this very fault
        report.write_text(earlier) if earlier else None
        code, _, said = run(capsys, "validate", path, tmp_path, "--json", report, "--ignore", "unknown_format", "--fix")
        [fault] = json.loads(report.read_text())
        assert code == 1 and fault["message"] in said and said.count("\n") == 1
        assert (fault["kind"], fault["id"], fault["line"]) == ("unknown_format", None, None)
    report.write_text("[]")
    for words in (["none.json"], [PHOTOS / "photos.json", PHOTOS, "--format", "none"]):  # mistakes of another sort
        assert run(capsys, "validate", *words, "--json", report)[0] == 1 and report.read_text() == "[]"


def test_two_outputs_are_two_files(bad, tmp_path, capsys):
    (tmp_path / "link").symlink_to(".")
    for fix in (["--fix", tmp_path / "bad_clean.jsonl"], ["--fix"]):
        code, printed, said = run(capsys, "validate", bad, tmp_path, "--json", tmp_path / "link/bad_clean.jsonl", *fix)
        assert (code, printed) == (2, "") and "--json and --fix name the same file" in said
    assert not (tmp_path / "bad_clean.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validate", "--show", "-3"], "--show: -3 is less than 0"),
        (["validate", "--max_area", "-1"], "--max_area: -1 is less than 1"),
        (["validate", "--model", CHECKPOINT, "--max_length", "-5"], "--max_length: -5 is less than 1"),
        (["stats", "--model", CHECKPOINT, "--batch_tokens", "0"], "--batch_tokens: 0 is less than 1"),
        (["stats", "--max_area", "x"], "unrecognized arguments"),
        (["stats", "--model", CHECKPOINT, "--max_length", "many"], "'many' is no whole number"),
        (["stats", "--model", CHECKPOINT, "--min_frames", "5", "--max_frames", "2"], "--min_frames 5 is above"),
        (["stats", "--model", CHECKPOINT, "--min_pixels", "5", "--max_pixels", "2"], "--min_pixels 5 is above"),
        (["stats", "--max_frames", "2"], "name it with --model"),
        (["validate", "--min_pixels", "9"], "name it with --model"),
        (["sample", "--num_samples", "0"], "--num_samples: 0 is less than 1"),
        (["split", "--train_ratio", "1.2", "--val_ratio", "-0.1", "--test_ratio", "-0.1"], "train_ratio is 1.2"),
        (["split", "--train_ratio", "nan"], "train_ratio is nan: a share is a number from 0 to 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_at_once(words, said, tmp_path, capsys):
    command, *options = words
    code, printed, error = run(capsys, command, tmp_path / "none.json", *options)
    assert (code, printed) == (2, "") and said in error


def test_the_token_limit_needs_a_model(tmp_path, capsys):
    code, _, said = run(capsys, "validate", PHOTOS / "photos.json", PHOTOS, "--max_length", 100)
    assert code == 2 and "name it with --model" in said
    words = ["validate", PHOTOS / "photos.json", PHOTOS, "--max_length", 200, "--model", CHECKPOINT]
    code, printed, _ = run(capsys, *words)
    assert code == 1 and "too_long (" in printed


def test_absolute_paths_only_where_they_are_allowed(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    path = tmp_path / "a.json"
    path.write_text(json.dumps([talk("<image>", "A.", image=str(tmp_path / "a.png"))]))
    assert run(capsys, "validate", path, tmp_path / "deep")[0] == 1
    assert run(capsys, "validate", path, tmp_path / "deep", "--allow_absolute")[0] == 0


def test_splits_of_a_file_and_leaks_between_files(tmp_path, capsys):
    path = tmp_path / "full.json"
    path.write_text((PHOTOS / "photos.json").read_text())
    code, printed, _ = run(capsys, "split", path, "--image_folder", PHOTOS, "--seed", 3)
    names = [tmp_path / f"full_{part}.json" for part in ("train", "val", "test")]
    assert code == 0 and all(str(name) in printed for name in names) and "asked for 80.0%" in printed
    assert sum(len(json.loads(name.read_text())) for name in names) == 28
    code, printed, _ = run(capsys, "validate", names[0], PHOTOS, "--against", path)
    assert code == 1 and "split_leak" in printed
    code, _, said = run(capsys, "split", path, "--train_ratio", 0.9)
    assert code == 2 and "sum to 1" in said


def test_a_sample_is_valid_and_converts(tmp_path, capsys):
    path = tmp_path / "sample.json"
    assert run(capsys, "sample", path, "--num_samples", 9)[0] == 0
    assert run(capsys, "validate", path, tmp_path)[0] == 0
    code, _, said = run(capsys, "sample", path)
    assert code == 1 and "is there already" in said
    out = tmp_path / "thousand.jsonl"
    code, printed, _ = run(capsys, "convert", path, out, "--boxes", "thousand", "--image_folder", tmp_path)
    assert code == 0 and "9 records written" in printed
    assert {record.box_coordinates for record in read_records(out)} == {"thousand"} or "thousand" in out.read_text()
    assert run(capsys, "validate", out, tmp_path)[0] == 0
    assert run(capsys, "convert", path, out, "--boxes", "metres")[0] == 2


def test_stats_as_a_table_and_as_json(tmp_path, capsys):
    words = ["--model", CHECKPOINT, "--max_length", 300, "--max_pixels", 300_000, "--batch_tokens", 4096]
    code, printed, said = run(capsys, "stats", PHOTOS / "photos.json", PHOTOS, *words, "--json", tmp_path / "s.json")
    assert (code, said) == (0, "")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["records"] == 28 and found["kinds"]["find"] == 5 and found["videos"] == 2
    assert found["tokens"]["over"] > 0 and found["tokens"]["max_length"] == 300
    assert 0 <= found["padding"]["planned"] < 1 and found["padding"]["batch_tokens"] == 4096
    for part in ("find 5", "over 300 tokens", "planned by length", "<- limit", "learned from"):
        assert part in printed
    code, _, said = run(capsys, "stats", PHOTOS / "photos.json", PHOTOS, "--model", CHECKPOINT, "--max_pixels", 9)
    assert code == 1 and "is above max_pixels 9" in said
    code, printed, _ = run(capsys, "stats", PHOTOS / "photos.json", PHOTOS)
    assert code == 0 and "tokens" not in printed
    assert run(capsys, "stats", PHOTOS / "photos.json", "--max_length", 10)[0] == 2


def test_stats_of_a_faulty_file_go_on_and_say_so(bad, tmp_path, capsys):
    code, printed, _ = run(capsys, "stats", bad, tmp_path)
    assert code == 0 and "could not be counted in full: 3" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    "words",
    [["validate", "none.json"], ["split", "none.json"], ["stats", "none.json"], ["convert", "none.json", "x.json"]],
)
def test_a_file_that_is_not_there_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, said = run(capsys, *words)
    assert code == 1 and said.startswith("ovisnb: there is no data file at none.json") and said.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["valid"], ["validate"], ["sample"], ["split", "a", "--train_ratio", "x"]])
def test_mistakes_in_the_command_line(words, capsys):
    code, _, said = run(capsys, *words)
    assert code == 2 and "usage: ovisnb data" in said


def test_what_a_terminal_cannot_show_is_spelt_out(bad, tmp_path):
    command = [sys.executable, "-m", "ovisnb.cli", "data", "validate", str(bad), str(tmp_path)]
    rows = [json.dumps(talk("é", "", id="漢"))]
    bad.write_text("\n".join(rows))
    result = subprocess.run(
        command, capture_output=True, check=False, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, cwd=ROOT
    )
    assert result.returncode == 1 and rb"\u6f22" in result.stdout, result.stderr


def test_a_mistake_shows_the_usage_without_the_table_of_kinds(capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "validate", "x.json", "--max_length", "9"])
    assert "kinds of faults" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "stats"])
def test_an_image_folder_that_is_none_is_one_sentence(command, bad, tmp_path, capsys):
    assert cli.main(["data", command, str(bad), str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("is not a folder") == 1


def test_one_record_is_no_records_and_pictures_say_where_they_are(tmp_path, capsys):
    cli.main(["data", "sample", str(tmp_path / "one.json"), "--num_samples", "1"])
    cli.main(["data", "split", str(tmp_path / "one.json")])
    printed = capsys.readouterr().out
    assert "1 record written" in printed and "groups that share no picture: 1;" in printed
    (tmp_path / "none.json").write_text("[]")
    assert cli.main(["data", "split", str(tmp_path / "none.json")]) == 1
    assert "holds no record" in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text("{\n{")
    assert cli.main(["data", "stats", str(tmp_path / "broken.jsonl")]) == 1


@pytest.mark.parametrize("command, working", [("stats", "stats._count"), ("split", "split._Groups.add")])
def test_a_stopped_bar_ends_its_line_before_anything_is_said(monkeypatch, tmp_path, command, working):
    def stop(*arguments):
        raise KeyboardInterrupt

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(f"ovisnb.data.{working}", stop)
    data = tmp_path / "a\x1b[31mb.jsonl"
    data.write_text('{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n')
    assert cli.main(["data", command, str(data)]) == 130
    shown = terminal.getvalue()
    assert re.search(r"0 \w+ \[.*\]\s*\novisnb: stopped\n$", shown) and "\x1b[31m" not in shown
