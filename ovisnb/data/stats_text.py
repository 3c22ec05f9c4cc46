"""The numbers of a data set as a table of text, and as JSON.

stats = summarise_file("train.jsonl", processor, image_folder="images")
print(stats_text(stats, max_length=4096, padding=padding_of(stats, 16384)))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from ovisnb.data.boxes import area
from ovisnb.data.checks.faults import plain
from ovisnb.data.stats import Stats, quantiles

BATCH_TOKENS = 16384
_BARS = 8  # of the histogram of lengths
_WIDTH = 40  # characters of its longest bar


class PaddingWaste(NamedTuple):
    """Padding as a share of all tokens that are computed, 0 to 1, planned by length and in the file's order."""

    batches: int
    """Of the plan."""
    planned: float
    plain_size: int
    """Records in a plain batch: as many as the plan's batches have on average."""
    plain: float
    batch_tokens: int


def padding_of(
    stats: Stats, batch_tokens: int | None = None, batch_images: int | None = None, max_length: int | None = None
) -> PaddingWaste | None:
    """What batches of this set waste; None where no tokens were counted. `max_length` cuts longer records.

    `batch_tokens` is 16,384 by default, or the longest record's if that is more. Raises ValueError for a
    record that is over a budget by itself.
    """
    if not stats.tokens:
        return None
    from ovisnb.chat.batching import Length, padding, plan_batches  # torch, only where tokens were counted

    lengths = [
        Length(tokens if max_length is None else min(tokens, max_length), images)
        for tokens, images in zip(stats.tokens, stats.pictures)
    ]
    budget = batch_tokens or max(BATCH_TOKENS, *(length.tokens for length in lengths))
    plan = plan_batches(lengths, max_tokens=budget, max_images=batch_images, seed=0)
    size = max(1, round(len(lengths) / len(plan)))
    rows = [range(start, min(start + size, len(lengths))) for start in range(0, len(lengths), size)]
    return PaddingWaste(len(plan), padding(lengths, plan).share, size, padding(lengths, rows).share, budget)


def stats_dict(stats: Stats, max_length: int | None = None, padding: PaddingWaste | None = None) -> dict[str, Any]:
    """The numbers as JSON holds them; quantiles rather than every value."""
    found: dict[str, Any] = {
        "records": stats.records,
        "kinds": dict(stats.kinds.most_common()),
        "turns": _counts(stats.turns),
        "images": _counts(stats.images),
        "videos": stats.videos,
        "tool_calls_per_answer": _counts(stats.calls),
        "pictures": stats.sizes.total,
        "smallest_picture": stats.smallest,
        "largest_picture": stats.largest,
        "boxes": stats.boxes.total,
        "points": stats.points.total,
        "calls": stats.crops.total,
        "outside": stats.outside,
        "box_area": _quantiles(map(area, stats.boxes)),
        "call_area": _quantiles(map(area, stats.crops)),
        "problems": {"total": stats.problems.total, "first": list(stats.problems)},
    }
    if stats.tokens:
        found["tokens"] = {"total": sum(stats.tokens), "supervised": sum(stats.supervised), **_quantiles(stats.tokens)}
        if max_length is not None:
            found["tokens"] |= {"max_length": max_length, "over": stats.tokens.above(max_length)}
    if padding is not None:
        found["padding"] = padding._asdict()
    return found


def stats_text(stats: Stats, max_length: int | None = None, padding: PaddingWaste | None = None) -> str:
    """The numbers as a table, safe to print."""
    kinds = [f"{plain(kind, 40)} {number:,}" for kind, number in stats.kinds.most_common(12)]
    kinds += [f"and {len(stats.kinds) - 12} more"] if len(stats.kinds) > 12 else []
    rows = [
        ("records", f"{stats.records:,}"),
        ("by kind", ", ".join(kinds)),
        ("turns a record", _listed(stats.turns)),
        ("pictures a record", _listed(stats.images)),
    ]
    rows += [("records with a video", f"{stats.videos:,}")] if stats.videos else []
    if stats.smallest and stats.largest:
        small, large = ("{}x{}".format(*size) for size in (stats.smallest, stats.largest))
        wide, high = (quantiles(sides, 0.5)[0] for sides in zip(*stats.sizes))
        rows.append(("picture sizes", f"{small} to {large} pixels; the median is {wide} wide, {high} high"))
    for name, sample in (("boxes", stats.boxes), ("boxes of tool calls", stats.crops)):
        if sample:
            shares = ", ".join(f"{share:.1%}" for share in quantiles(map(area, sample), 0.05, 0.5, 0.95))
            rows.append((name, f"{sample.total:,}; they cover {shares} of the picture (5%, median, 95%)"))
    rows += [("points", f"{stats.points.total:,}")] if stats.points.total else []
    rows += [("outside their picture", f"{stats.outside:,} boxes, points or calls")] if stats.outside else []
    rows.append(("tool calls an answer", _listed(stats.calls)))
    rows += _token_rows(stats, max_length) if stats.tokens else []
    if padding is not None:
        batches = f"{padding.batches:,} {'batch' if padding.batches == 1 else 'batches'}"
        limit = f"up to {padding.batch_tokens:,} tokens"
        planned = f"{padding.planned:.1%} of what is computed, in {batches} of {limit} planned by length;"
        rows.append(("padding", planned))
        rows.append(("", f"{padding.plain:.1%} in plain batches of {padding.plain_size:,}, in the file's order"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += _histogram(stats.tokens, max_length) if stats.tokens else []
    if stats.problems:
        said = f"records that could not be counted in full: {stats.problems.total:,} (see `ovisnb data validate`)"
        lines += ["", said, *(f"  {plain(problem)}" for problem in stats.problems[:5])]
    return "\n".join(lines)


def _token_rows(stats: Stats, max_length: int | None) -> list[tuple[str, str]]:
    total, taught = sum(stats.tokens), sum(stats.supervised)
    ranks = ", ".join(f"{rank:,}" for rank in quantiles(stats.tokens, 0.5, 0.95, 1))
    rows = [
        ("tokens", f"{total:,}, of which {taught:,} ({taught / total:.1%}) are learned from"),
        ("tokens a record", f"{ranks} (median, 95%, longest)"),
    ]
    if max_length is not None:
        over = stats.tokens.above(max_length)
        rows.append((f"over {max_length:,} tokens", f"{over:,} ({over / len(stats.tokens):.1%})"))
    return rows


def _histogram(tokens: Iterable[int], max_length: int | None) -> list[str]:
    """The lines of a histogram of lengths, in steps of 1, 2, 5, 10, ... tokens."""
    longest = max(tokens)
    step = next(
        size for size in (one * 10**zeros for zeros in range(12) for one in (1, 2, 5)) if size * _BARS >= longest
    )
    bins = Counter((number - 1) // step for number in tokens)
    most = max(bins.values())
    lines = ["", "tokens     records"]
    for at in range(-(-longest // step)):
        mark = "  <- limit" if max_length is not None and at * step < max_length <= (at + 1) * step else ""
        bar = "#" * -(-_WIDTH * bins[at] // most)
        lines.append(f"to {(at + 1) * step:>6,}  {bins[at]:>7,} {bar}{mark}".rstrip())
    return lines


def _listed(counts: Counter[int], shown: int = 8) -> str:
    """ "16 with 2, 6 with 3": how many have how many."""
    found = [f"{number:,} with {value}" for value, number in sorted(counts.items())]
    rest = sum(number for _, number in sorted(counts.items())[shown:])
    return ", ".join(found[:shown] + ([f"{rest:,} with more"] if rest else [])) or "none"


def _counts(counts: Counter[int]) -> dict[str, int]:
    return {str(value): number for value, number in sorted(counts.items())}


def _quantiles(values: Iterable[float]) -> dict[str, float]:
    names = {"min": 0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1}
    ordered = sorted(values)
    return dict(zip(names, quantiles(ordered, *names.values()))) if ordered else {}
