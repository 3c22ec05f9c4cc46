"""Where a relative path is found: under the working directory, else under the repository."""

from __future__ import annotations

from pathlib import Path

from ovisnb.paths import repository_root, resolve, resolve_model

ROOT = Path(__file__).parents[1]


def test_a_path_means_the_same_file_from_the_root_and_from_the_notebooks(monkeypatch):
    for folder in (ROOT, ROOT / "notebooks", ROOT / "tests" / "show"):
        monkeypatch.chdir(folder)
        assert repository_root() == ROOT
        assert resolve("data/photos/photos.json") == ROOT / "data" / "photos" / "photos.json"
        assert resolve("outputs/not-there-yet") == ROOT / "outputs" / "not-there-yet"


def test_what_lies_in_the_working_directory_comes_first(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("data") == tmp_path / "data"


def test_another_project_is_not_taken_for_this_one(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    assert repository_root() == ROOT  # the checkout that the package lies in


def test_an_absolute_path_and_home_stay(monkeypatch, tmp_path):
    assert resolve(tmp_path / "x") == tmp_path / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x") == tmp_path / "x"


def test_a_model_is_a_folder_or_else_a_hub_id(tmp_path):
    assert resolve_model(tmp_path) == str(tmp_path)
    assert resolve_model("tests/golden/ovis2_5/checkpoint") == str(ROOT / "tests/golden/ovis2_5/checkpoint")
    assert resolve_model("AIDC-AI/Ovis2.5-2B") == "AIDC-AI/Ovis2.5-2B"
