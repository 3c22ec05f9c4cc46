"""Pictures for the notebooks: token spans, regions on photographs, records, training curves."""

from __future__ import annotations

from .adapters import show_shares, show_updates
from .browse import Browser, browse
from .data import examples, regions_of, select, show_record, with_regions
from .grounding import before_after, compared, pair_up, question_of, with_box
from .html import Html, Plot
from .lens import MaskLens, mask_lens
from .live import watch
from .overview import kind_table, overview_figure, overview_table, problem_table
from .payload import token_summary
from .plan import show_plan
from .regions import Picture, draw_regions, gallery, show_regions
from .runs import show_accuracy, show_folder, show_metrics, show_run
from .shelf import Shelf, open_shelf
from .tokens import reason_table, show_tokens

__all__ = [
    "Browser",
    "Html",
    "MaskLens",
    "Picture",
    "Plot",
    "Shelf",
    "before_after",
    "browse",
    "compared",
    "draw_regions",
    "examples",
    "gallery",
    "kind_table",
    "mask_lens",
    "open_shelf",
    "overview_figure",
    "overview_table",
    "pair_up",
    "problem_table",
    "question_of",
    "reason_table",
    "regions_of",
    "select",
    "show_accuracy",
    "show_folder",
    "show_metrics",
    "show_plan",
    "show_record",
    "show_regions",
    "show_run",
    "show_shares",
    "show_tokens",
    "show_updates",
    "token_summary",
    "watch",
    "with_box",
    "with_regions",
]
