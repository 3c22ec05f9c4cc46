"""Watching a run: its lines once each, one picture drawn anew, and what is said when it ends or the looking does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from ovisnb.show import live
from ovisnb.train.launch import RunError


class Told:
    """A run that says, at every look, what the next of `looks` holds: (lines, losses so far)."""

    def __init__(self, folder, looks, failure=None):
        self.folder, self.looks, self.failure, self.pid = folder, iter(looks), failure, 7
        self.running = True

    def lines(self):
        lines, losses = next(self.looks, ([], None))
        if losses is not None:
            rows = [json.dumps({"step": at + 1, "loss": loss, "learning_rate": 1e-4}) for at, loss in enumerate(losses)]
            (self.folder / "metrics.jsonl").write_text("\n".join(rows))
        if "interrupt" in lines:
            raise KeyboardInterrupt
        self.running = "end" not in lines
        return lines

    def check(self):
        if self.failure:
            raise RunError(self.failure)


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, as (place, plot); no waiting, and every look may draw."""
    found = []

    class Place:
        def __init__(self):
            self.number = len(found)

        def update(self, plot):
            found.append((self.number, plot))

    def display(plot, display_id):
        place = Place()
        place.update(plot)
        return place

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    monkeypatch.setattr(live, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=live.time.monotonic))
    monkeypatch.setattr(live, "REDRAW", 0)
    return found


def test_lines_come_once_and_the_picture_is_drawn_in_one_place(tmp_path, shown, capsys):
    looks = [
        (["start"], None),
        (["step 1"], [2.0]),
        ([], None),
        (["step 2"], [2.0, 1.0]),
        (["step 3", "end"], [2, 1, 0.5]),
    ]
    live.watch(Told(tmp_path, looks))
    assert capsys.readouterr().out.split("\n") == ["start", "step 1", "step 2", "step 3", "end", ""]
    assert [place for place, _ in shown] == [0, 0, 0]
    (line, *_) = shown[-1][1].figure.axes[0].lines
    assert list(line.get_ydata()) == [2, 1, 0.5]  # the last picture shows the end


def test_the_last_look_comes_after_the_end(tmp_path, shown, capsys):
    run = Told(tmp_path, [(["last words", "end"], [1.0])])
    run.running = False
    live.watch(run)
    assert "last words" in capsys.readouterr().out and len(shown) == 1


def test_a_failed_run_raises_its_own_sentence(tmp_path, shown):
    with pytest.raises(RunError, match="^there is no picture$"):
        live.watch(Told(tmp_path, [(["end"], None)], failure="there is no picture"))


def test_an_interrupt_ends_the_looking(tmp_path, shown, capsys):
    run = Told(tmp_path, [(["step 1"], [1.0]), (["interrupt"], None)], failure="not asked")
    live.watch(run)
    out = capsys.readouterr().out
    assert "the run goes on (process 7)" in out and f"watch(Run.attach({str(tmp_path)!r}))" in out and run.running


def test_half_a_line_of_metrics_is_passed_over(tmp_path, shown):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    live.watch(Told(tmp_path, [(["end"], None)]))
    assert not shown


def test_outside_a_notebook_lines_suffice(tmp_path, shown, monkeypatch, capsys):
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    live.watch(Told(tmp_path, [(["step 1", "end"], [1.0])]))
    assert not shown and "step 1" in capsys.readouterr().out
