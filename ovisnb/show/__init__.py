"""Pictures for the notebooks: token spans, regions on photographs, records, training curves."""

from __future__ import annotations

from .data import examples, overview_figure, overview_table, regions_of, select, show_record, summarise
from .grounding import before_after, compared, pair_up, question_of, with_box
from .html import Html, Plot
from .regions import Picture, draw_regions, gallery, show_regions
from .runs import show_accuracy, show_run
from .tokens import reason_table, show_tokens, token_summary

__all__ = [
    "Html",
    "Picture",
    "Plot",
    "before_after",
    "compared",
    "draw_regions",
    "examples",
    "gallery",
    "overview_figure",
    "overview_table",
    "pair_up",
    "question_of",
    "reason_table",
    "regions_of",
    "select",
    "show_accuracy",
    "show_record",
    "show_regions",
    "show_run",
    "show_tokens",
    "summarise",
    "token_summary",
    "with_box",
]
