"""A training run: its curves, read from the `metrics.jsonl` in its folder, what it came to, and what it left behind."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from matplotlib.figure import Figure

from ovisnb.generate import summary

from .html import BLUE, FONT, GREY, RED, Html, Plot, muted, table


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of `folder`/metrics.jsonl as dicts; ValueError names the file and line that is no JSON."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"No metrics.jsonl in {folder}: give the folder that a training run wrote.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error.msg}): the run may have been cut off.") from error
    return rows


def series(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of every line that holds both `step` and a number under `key`."""
    points = [(row["step"], row[key]) for row in rows if "step" in row and isinstance(row.get(key), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as in Adam), so that it begins on the curve."""
    mean, out = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**count))
    return out


def show_run(folder: str | Path) -> Plot:
    """Training loss (with its moving average), evaluation loss where there is one, and learning rate."""
    rows = read_metrics(folder)
    steps, losses = series(rows, "loss")
    if not losses:
        raise ValueError(f"{Path(folder) / 'metrics.jsonl'} holds no training loss: the run logged no step.")
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    loss_axis, rate_axis = figure.subplots(1, 2, width_ratios=(2, 1))
    loss_axis.plot(steps, losses, color=BLUE, alpha=0.35 if len(losses) > 20 else 1, lw=1.2, label="training loss")
    if len(losses) > 20:
        loss_axis.plot(steps, smooth(losses), color=BLUE, lw=2, label="moving average")
    loss_axis.plot(*series(rows, "eval_loss"), color=RED, marker="o", ms=5, lw=1.5, label="evaluation loss")
    if not series(rows, "eval_loss")[0]:
        loss_axis.lines[-1].remove()
    loss_axis.set(title="Loss", xlabel="step", ylabel="cross-entropy per supervised token")
    loss_axis.legend(frameon=False)
    rates = {
        key: series(rows, key) for key in sorted({k for row in rows for k in row if k.startswith("learning_rate")})
    }
    for (key, (at, values)), colour in zip(rates.items(), (GREY, BLUE, RED, "#009e73", "#cc79a7")):
        rate_axis.plot(at, values, color=colour, lw=2, label=key.removeprefix("learning_rate").strip("_/") or "all")
    rate_axis.set(title="Learning rate", xlabel="step")
    rate_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if len(rates) > 1:
        rate_axis.legend(frameon=False)
    for axis in (loss_axis, rate_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    return Plot(figure)


def show_accuracy(results: dict[str, list[dict]]) -> Plot:
    """Share of boxes found by number of objects in the scene, with 95% intervals.

    `results` is name -> lines of `ovisnb.generate.summary`; several names (before, after) stand side by side.
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    groups = list(dict.fromkeys(str(line["objects"]) for lines in results.values() for line in lines))
    width = 0.8 / max(1, len(results))
    for at, ((name, lines), colour) in enumerate(zip(results.items(), (GREY, BLUE) if len(results) > 1 else (BLUE,))):
        place = [groups.index(str(line["objects"])) + (at - (len(results) - 1) / 2) * width for line in lines]
        rate = [line["accuracy"] for line in lines]
        spread = [[max(0.0, line["accuracy"] - line["low"]) for line in lines]]
        spread.append([max(0.0, line["high"] - line["accuracy"]) for line in lines])
        axis.bar(place, rate, width * 0.9, yerr=spread, capsize=3, color=colour, label=name, ecolor="#333333")
        for x, line in zip(place, lines):
            axis.text(x, min(line["high"], 1) + 0.02, f"{line['accuracy']:.2f}", ha="center", fontsize=9)
    counts = {str(line["objects"]): line["n"] for lines in results.values() for line in lines}
    axis.set_xticks(range(len(groups)), [f"{group}\nn = {counts[group]}" for group in groups])
    axis.set(ylim=(0, 1.15), ylabel="share with IoU ≥ 0.5", xlabel="objects in the scene")
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.spines[["top", "right"]].set_visible(False)
    if len(results) > 1:
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return Plot(figure)


def show_metrics(results: dict[str, dict[str, list[dict]]]) -> Html:
    """A table of what was measured: rows of `grounding_accuracy` or `label_accuracy` by what they are on and by when.

    `results` is {"boxes on held-out scenes": {"before": rows, "after": rows}, ...}. Of boxes the mean IoU and the share
    with IoU >= 0.5, of labels the share that is right; shares with their 95% intervals.
    """
    times = list(dict.fromkeys(time for found in results.values() for time in found))
    lines = []
    for name, found in results.items():
        every = {time: summary(rows)[-1] for time, rows in found.items() if rows}
        if not every:
            continue
        counted = f"{name} (n = {next(iter(every.values()))['n']})"
        boxes = "mean_iou" in next(iter(every.values()))
        if boxes:
            lines.append(
                (f"{counted}: mean IoU", *(f"{every[t]['mean_iou']:.3f}" if t in every else "" for t in times))
            )
        what = f"{counted}: share with IoU ≥ 0.5" if boxes else f"{counted}: share right"
        lines.append((what, *(_share(every[time]) if time in every else "" for time in times)))
    return Html(table(lines, head=("", *times)))


def _share(line: dict) -> str:
    return f"{line['accuracy']:.2f} ({line['low']:.2f} to {line['high']:.2f})"


def show_folder(folder: str | Path) -> Html:
    """A link to a run folder, and the files and folders in it with their sizes.

    The link is relative to the notebook that is looked at: the one that JupyterLab runs, or the one that `ovisnb run`
    writes.
    """
    folder = Path(folder)
    seen_from = os.environ.get("OVISNB_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME")
    start = Path(seen_from).parent if seen_from else Path.cwd()
    link = quote(os.path.relpath(folder.absolute(), start.absolute()))
    rows = [
        (f"{path.name}/" if path.is_dir() else path.name, _size(path))
        for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name))
        if not path.name.startswith(".")
    ]
    head = f'<div style="{FONT}"><a href="{escape(link)}">{escape(str(folder))}</a></div>'
    return Html(head + table(rows) + muted("checkpoint-N and final/ open with ovisnb.load"))


def _size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
