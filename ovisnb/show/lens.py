"""The mask view for a person at the keyboard: the payload of `show_tokens`, with switches, in a widget.

    lens = MaskLens(encode(record, processor), processor, record=record)
    lens              # in a notebook: point at tokens, click one, use the switches
    lens.selected     # {"side": "", "position": 12, "id": 345, "label": 345, "reason": "answer", ...}

`lens.js` draws it, from text only: nothing of the data is ever parsed as markup.
"""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from ovisnb.chat import Encoded

from .html import Html, warnings
from .payload import MOST_TOKENS, payload
from .tokens import show_tokens


def mask_lens(encoded: Encoded | str | dict[str, Encoded | str], processor, *, interactive: bool = False, **options):
    """The mask lens for a person (`MaskLens`) or as a page that stays (`show_tokens`), with their `options`.

    Where one is a sentence in place of an `Encoded` (`Shelf.encode`), the sentence is shown instead.
    """
    sides = encoded.values() if isinstance(encoded, dict) else [encoded]
    if said := [one for one in sides if isinstance(one, str)]:
        return Html(warnings(said))
    return (MaskLens if interactive else show_tokens)(encoded, processor, **options)


class MaskLens(anywidget.AnyWidget):
    """The mask lens of one `Encoded`, or of several settings side by side (a dict name -> Encoded).

    Arguments are those of `show_tokens`. `only_supervised`, `token_ids` and `whitespace` follow the switches, and
    setting them here moves the switches. `selected` is None or what was clicked (or walked to with the arrow keys):
    side, position, id, label (None: no loss), reason, role, turn, kind, start and end of its span; of a picture's
    tokens, position is the first and id is None. Setting it to {"side": ..., "position": ...} selects that token.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")

    payload = traitlets.Dict().tag(sync=True)
    only_supervised = traitlets.Bool(False).tag(sync=True)
    token_ids = traitlets.Bool(False).tag(sync=True)
    whitespace = traitlets.Bool(True).tag(sync=True)
    selected = traitlets.Instance(dict, allow_none=True).tag(sync=True)

    def __init__(
        self,
        encoded: Encoded | dict[str, Encoded],
        processor,
        *,
        record=None,
        image_folder: str | Path | None = None,
        only_supervised: bool = False,
        token_ids: bool = False,
        whitespace: bool = True,
        limit: int = MOST_TOKENS,
    ):
        drawn = payload(encoded, processor, record=record, image_folder=image_folder, limit=limit)
        switches = {"only_supervised": only_supervised, "token_ids": token_ids, "whitespace": whitespace}
        super().__init__(payload=drawn, **switches)
