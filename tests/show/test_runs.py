"""Curves: what is drawn is what the run wrote."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from ovisnb.show import show_accuracy, show_folder, show_metrics, show_run
from ovisnb.show.runs import read_metrics, series, smooth

LINES = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-4},
    {"step": 2, "loss": 3.0, "learning_rate": 5e-5},
    {"step": 2, "eval_loss": 3.5},
    {"step": 3, "loss": None, "learning_rate": 1e-5},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return tmp_path


def curves(axis) -> dict:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_the_curves_are_the_runs_numbers(run):
    losses, rates = show_run(run).figure.axes
    assert curves(losses) == {"training loss": ([1, 2], [4.0, 3.0]), "evaluation loss": ([2], [3.5])}
    assert curves(rates) == {"all": ([1, 2, 3], [1e-4, 5e-5, 1e-5])}


def test_without_evaluation_there_is_no_curve_for_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]))
    assert list(curves(show_run(tmp_path).figure.axes[0])) == ["training loss"]


def test_a_long_run_has_a_moving_average(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({"step": n, "loss": 1 / n}) for n in range(1, 100)))
    assert "moving average" in curves(show_run(tmp_path).figure.axes[0])


def test_the_moving_average_starts_on_the_curve_and_keeps_a_constant():
    assert smooth([7.0]) == pytest.approx([7.0])
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([0.0, 1.0], weight=0.5)[1] == pytest.approx(2 / 3)


def test_series_leaves_out_what_is_no_number(run):
    assert series(read_metrics(run), "loss") == ([1, 2], [4.0, 3.0])


def test_it_is_stored_at_twice_the_size_it_is_shown(run):
    data, meta = show_run(run)._repr_png_()
    assert Image.open(io.BytesIO(data)).width == pytest.approx(2 * meta["width"], abs=2)


def test_what_is_no_run_is_said_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No metrics.jsonl in .*: give the folder that a training run wrote"):
        show_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step"')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not JSON"):
        show_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training loss"):
        show_run(tmp_path)


def line(objects, hits, n, low, high) -> dict:
    return {"objects": objects, "n": n, "hits": hits, "accuracy": hits / n, "low": low, "high": high, "mean_iou": 0.5}


def test_accuracy_bars_are_the_rates_by_number_of_objects():
    before, after = (
        [line(1, 1, 4, 0.05, 0.7), line("all", 1, 4, 0.05, 0.7)],
        [line(1, 3, 4, 0.3, 0.95), line("all", 3, 4, 0.3, 0.95)],
    )
    axis = show_accuracy({"before": before, "after": after}).figure.axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0.25, 0.25, 0.75, 0.75]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1\nn = 4", "all\nn = 4"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before", "after"]


def test_metrics_of_boxes_and_labels_stand_side_by_side():
    boxes = [{"objects": 1, "hit": True, "iou": 0.9}, {"objects": 2, "hit": False, "iou": 0.3}]
    labels = [{"objects": 1, "hit": True}]
    source = str(
        show_metrics({"<boxes>": {"before": boxes[1:], "after": boxes}, "labels": {"after": labels}, "no": {}})
    )
    assert "&lt;boxes&gt; (n = 1): mean IoU" in source and ">0.300<" in source and ">0.600<" in source
    assert "0.50 (0.09 to 0.91)" in source
    assert "labels (n = 1): share right" in source and "1.00 (0.21 to 1.00)" in source
    assert source.index(">before<") < source.index(">after<") and "no" not in source.replace("nowrap", "")


def test_a_folder_is_linked_from_the_notebook_that_is_looked_at(tmp_path, monkeypatch):
    folder = tmp_path / "a <run>"
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "model.safetensors").write_bytes(bytes(250_000))
    (folder / "settings.json").write_text("{}")
    (folder / ".hidden").write_text("")
    monkeypatch.setenv("OVISNB_NOTEBOOK", str(tmp_path / "notebooks" / "03.ipynb"))
    source = str(show_folder(folder))
    assert 'href="../a%20%3Crun%3E"' in source and "a &lt;run&gt;" in source and "<run>" not in source
    assert ">final/<" in source and ">0.2 MB<" in source and ">settings.json<" in source and ".hidden" not in source
