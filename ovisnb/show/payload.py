"""What the mask lens draws, as plain data: one dict for the static HTML and for the widget.

    payload(encode(record, processor), processor, record=record)

Runs of tokens are the spans of `ovisnb.chat.encode`, labels are its labels: nothing derives a mask again. All text
is as it is to be read, not escaped; whoever draws it must never parse it as markup.
"""

from __future__ import annotations

from collections import Counter

from ovisnb.chat import IGNORE_INDEX, Encoded
from ovisnb.data.record import Record

from .pictures import Pictures, crop_name, thumbnail
from .pieces import one_line, pieces

# reason -> (background, text, what it means). Only "answer" is dark: what trains stands out by
# lightness alone; the pale ones are tints of the Okabe-Ito colour-blind-safe set.
REASON_COLOURS = {
    "answer": ("#0072b2", "#ffffff", "trains: the assistant's words"),
    "user": ("#fbe3b0", "#1a1a1a", "the user's words"),
    "system": ("#dccfe6", "#1a1a1a", "the system prompt"),
    "header": ("#cfcfcf", "#1a1a1a", "role headers and turn ends outside an answer"),
    "empty_think": ("#f3cfe0", "#1a1a1a", "the empty-think prefix put before a plain answer"),
    "image": ("#b5e3d3", "#1a1a1a", "an image's visual tokens"),
    "video": ("#c6e6f8", "#1a1a1a", "a video's visual tokens"),
    "tool_response": ("#f5c5a2", "#1a1a1a", "what a tool answered"),
    "ignored": ("#f5f0a8", "#1a1a1a", "an assistant turn marked ignored_gpt"),
    "separator": ("#ececec", "#1a1a1a", "the newline between turns"),
}
OTHER_COLOUR = ("#bcbcbc", "#1a1a1a", "")  # a reason this view has no colour for is still shown by name

MOST_TOKENS = 12_000  # text tokens of one side that are drawn; a browser stays quick with them
MOST_RUNS = 2_000  # spans of one side that are drawn
MOST_PICTURES = 64  # images with a thumbnail
FRAMES = 4  # thumbnails of a video
HEIGHT, WIDTH = 72, 160  # largest shown size of a thumbnail in CSS pixels


def token_summary(encoded: Encoded) -> dict:
    """Counts of one `Encoded`: id, tokens, supervised, share (0..1), images, video_frames, dropped,
    and `reasons`, a dict reason -> {"tokens": int, "share": float} with the most frequent first."""
    total = len(encoded.input_ids)
    counts: Counter = Counter()
    for span in encoded.spans:
        counts[span.reason] += span.end - span.start
    supervised = int((encoded.labels != IGNORE_INDEX).sum())
    share = lambda count: count / total if total else 0.0
    return {
        "id": encoded.id,
        "tokens": total,
        "supervised": supervised,
        "share": share(supervised),
        "images": 0 if encoded.image_grid_thw is None else len(encoded.image_grid_thw),
        "video_frames": 0 if encoded.video_grid_thw is None else int(encoded.video_grid_thw[:, 0].sum()),
        "dropped": list(encoded.dropped),
        "reasons": {r: {"tokens": n, "share": share(n)} for r, n in counts.most_common()},
    }


def in_order(reasons) -> list[str]:
    """The reasons, those with a colour first and in the order of REASON_COLOURS."""
    reasons = set(reasons)
    return [reason for reason in REASON_COLOURS if reason in reasons] + sorted(reasons - set(REASON_COLOURS))


def payload(
    encoded: Encoded | dict[str, Encoded],
    processor,
    *,
    record: Record | dict | None = None,
    image_folder=None,
    limit: int = MOST_TOKENS,
) -> dict:
    """One Encoded, or several of one record by their names, as lists, numbers and text. ValueError for no Encoded.

    `reasons`: reason -> [background, text colour, meaning], those that occur. `pieces`: texts of tokens, each
    [visible, plain, line breaks]. `media`: name -> {"title", "note", "pictures": [{"src", "width", "height"}]}, pictures
    only with a `record`. `sides`: see `_side`. `rows`: for each turn, for each side, the indices of its runs. `table`:
    lines of text that compare the sides, the first one the heading; empty for one side.
    """
    sides = encoded if isinstance(encoded, dict) else {"": encoded}
    if not sides:
        raise ValueError("There is nothing to show: give at least one Encoded.")
    record = Record.from_dict(record) if isinstance(record, dict) else record
    texts = pieces((token for one in sides.values() for token in one.input_ids.unique().tolist()), processor.tokenizer)
    places = {token: place for place, token in enumerate(texts)}
    drawn = [_side(name, encoded, places, limit) for name, encoded in sides.items()]
    used = dict.fromkeys((run["kind"], run["index"]) for side in drawn for run in side["runs"] if "media" in run)
    rows = {turn: [[] for _ in drawn] for turn in sorted({run["turn"] for side in drawn for run in side["runs"]})}
    for at, side in enumerate(drawn):
        for index, run in enumerate(side["runs"]):
            rows[run["turn"]][at].append(index)
    return {
        "reasons": {
            reason: list(REASON_COLOURS.get(reason, OTHER_COLOUR))
            for reason in in_order(name for side in drawn for name, *_ in side["shares"])
        },
        "pieces": [list(piece) for piece in texts.values()],
        "media": _media(record, image_folder, list(used)),
        "sides": drawn,
        "rows": list(rows.values()),
        "table": _table(drawn) if len(drawn) > 1 else [],
    }


def _side(name: str, encoded: Encoded, places: dict[int, int], limit: int) -> dict:
    """One Encoded: `name`, `id`, `facts` (a sentence), `notes` (sentences on what was dropped or is not shown),
    `tokens`, `supervised`, `shares` [[reason, tokens, share]] and `runs`, one for each span.

    A run has `start`, `end`, `role`, `turn`, `reason`, `kind`, `where` (these in words) and `trains` (whether any of
    its tokens has a label). Of text it has `parts`: {"at": position, "ids", "labels" (None: none has one), "pieces"
    (places in the payload's)}, the whole of it or its two ends. Of a picture: `index`, `media` (name), `lines`.
    """
    summary = token_summary(encoded)
    spans = encoded.spans[:MOST_RUNS]
    most = _even_limit([span.end - span.start for span in spans if span.kind == "text"], limit)
    grids = {  # in the order of the pictures in the tokens
        kind: iter([] if grid is None else grid.tolist())
        for kind, grid in (("image", encoded.image_grid_thw), ("video", encoded.video_grid_thw))
    }
    runs = [_run(span, encoded, places, most, grids) for span in spans]
    shown = sum(len(part["ids"]) for run in runs for part in run.get("parts", ()))
    text = sum(span.end - span.start for span in encoded.spans if span.kind == "text")
    notes = [one_line(note, 400) for note in summary["dropped"]]
    if shown < text:
        notes.append(
            f"{shown:,} of {text:,} text tokens are drawn (of long stretches the two ends); "
            "all are counted. A higher limit draws more."
        )
    if len(spans) < len(encoded.spans):
        notes.append(f"The first {len(spans):,} of {len(encoded.spans):,} spans are drawn; all are counted.")
    return {
        "name": one_line(name),
        "id": one_line(str(encoded.id)),
        "facts": _facts(summary),
        "notes": notes,
        "tokens": summary["tokens"],
        "supervised": summary["supervised"],
        "shares": [[reason, *summary["reasons"][reason].values()] for reason in in_order(summary["reasons"])],
        "runs": runs,
    }


def _run(span, encoded: Encoded, places: dict[int, int], most: int, grids: dict) -> dict:
    run = {
        "start": span.start,
        "end": span.end,
        "role": span.role,
        "turn": span.turn,
        "reason": span.reason,
        "kind": span.kind,
        "where": f"{span.reason} ({span.role or 'no role'}, turn {span.turn})",
        "trains": bool((encoded.labels[span.start : span.end] != IGNORE_INDEX).any()),
    }
    if span.kind == "text":
        length = span.end - span.start
        cuts = [(span.start, span.end)]
        if length > most:
            cuts = [(span.start, span.start + (most + 1) // 2), (span.end - most // 2, span.end)]
        return run | {"parts": [_part(start, end, encoded, places, run["trains"]) for start, end in cuts]}
    t, h, w = next(grids[span.kind])
    lines = [f"{t}×{h}×{w} patches", f"{span.end - span.start:,} tokens"]
    return run | {"index": span.media or 0, "media": _name(span.kind, span.media or 0), "lines": lines}


def _part(start: int, end: int, encoded: Encoded, places: dict[int, int], trains: bool) -> dict:
    ids = encoded.input_ids[start:end].tolist()
    labels = encoded.labels[start:end].tolist() if trains else None
    return {"at": start, "ids": ids, "labels": labels, "pieces": [places[token] for token in ids]}


def _even_limit(sizes: list[int], total: int) -> int:
    """The largest number that all sizes can be cut to so that they sum up to no more than `total`."""
    for done, size in enumerate(ordered := sorted(sizes)):
        even = total // (len(ordered) - done)
        if size > even:
            return even
        total -= size
    return max(sizes, default=0)


def _facts(summary: dict) -> str:
    facts = f"{summary['tokens']:,} tokens, {summary['supervised']:,} of them train ({summary['share']:.1%})"
    if summary["images"]:
        facts += f" · {summary['images']} image{'s' * (summary['images'] > 1)}"
    if summary["video_frames"]:
        facts += f" · a video of {summary['video_frames']} frames"
    return facts


def _table(sides: list[dict]) -> list[list[str]]:
    """Tokens of every side in all, by reason, and supervised; for two sides also the difference."""
    counts = [{reason: count for reason, count, _ in side["shares"]} for side in sides]
    lines = [["tokens", *(side["tokens"] for side in sides)]]
    for reason in in_order(reason for side in counts for reason in side):
        lines.append([reason, *(side.get(reason, 0) for side in counts)])
    lines.append(["supervised", *(side["supervised"] for side in sides)])
    two = len(sides) == 2
    head = ["", *(side["name"] for side in sides), *(["difference"] if two else [])]
    change = lambda line: [f"{line[2] - line[1]:+,}" if line[2] != line[1] else "="] if two else []
    return [head] + [[line[0], *(f"{count:,}" for count in line[1:]), *change(line)] for line in lines]


def _media(record: Record | None, image_folder, used: list[tuple[str, int]]) -> dict:
    """name -> title, note and thumbnails of each picture in use; a picture that cannot be read has a note saying why."""
    found = {_name(*which): {"title": _name(*which), "note": "", "pictures": []} for which in used}
    if record is None:
        return found
    opened = Pictures(record, image_folder)
    for number, ((kind, index), one) in enumerate(zip(used, found.values())):
        if kind == "image" and record.images[index].box is not None:
            one["title"] += f" · {crop_name(record.images[index])}"
        if number >= MOST_PICTURES:
            one["note"] = f"no thumbnail: the first {MOST_PICTURES} have one"
            continue
        images = opened.frames(FRAMES) if kind == "video" else opened.open(index, at_least=2 * max(HEIGHT, WIDTH))
        if isinstance(images, str):
            one["note"] = f"cannot be shown: {one_line(images, 400)}"
            continue
        if kind == "video":
            one["note"] = f"{len(images)} of its frames"
        shown = images.values() if kind == "video" else [images]
        one["pictures"] = [thumbnail(image, WIDTH, HEIGHT) for image in shown]
    return found


def _name(kind: str, index: int) -> str:
    return "video" if kind == "video" else f"image {index + 1}"
