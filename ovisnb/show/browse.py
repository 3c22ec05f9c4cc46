"""Browsing a data set: cards of its records by kind and by problem, as one static page or with controls.

    browse(shelf, cards=3)                # the first three of each kind and of each problem
    browse(shelf, interactive=True)       # choose, go on, go back; shelf[_.position] is what is shown

Both show the same cards. With controls a card is made when it is looked at, so that a set of any size opens at once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import traitlets

from ovisnb.data.record import Record

from .data import show_faults, show_record
from .html import FONT, MUTED, Html, words
from .pieces import one_line
from .shelf import Shelf

KINDS = 16  # kinds that the static form shows; the most frequent
CHOICES = 200  # kinds that the controls offer
ALL = ""  # the choice of no filter; with None a list of ipywidgets has nothing chosen and stands there blank


def browse(shelf: Shelf | Sequence[Record], image_folder=None, *, interactive: bool = False, cards: int = 3):
    """Records as cards: `Html` with the first `cards` of each kind and problem, or a `Browser`.

    `shelf` may also be a sequence of records, whose pictures lie in `image_folder`.
    """
    if not isinstance(shelf, Shelf):
        shelf = Shelf(shelf, image_folder=image_folder)
    return Browser(shelf) if interactive else Html(_page(shelf, cards))


def card(shelf: Shelf, position: int) -> Html:
    """The card of one item of a shelf."""
    item = shelf[position]
    if not isinstance(item, Record):
        return show_faults(item)
    return show_record(item, shelf.image_folder, faults=shelf.faults_at(position))


def _alone(method: Callable) -> Callable:
    """One at a time: JupyterLab has clicks handled in a thread of their own, also while a cell runs."""

    @functools.wraps(method)
    def alone(self, *some):
        with self._lock:
            return method(self, *some)

    return alone


class Browser(widgets.VBox):
    """Cards with controls: two filters, back and on, and a slider.

    `position` is where the item shown stands on the shelf, `item` the item itself (None if nothing is left by
    the filters); both can be observed. Setting `position` goes there (TraitError where the filters leave it out),
    setting `kind` or `problem` moves the filters.
    """

    position = traitlets.Int(None, allow_none=True)
    item = traitlets.Any(None)

    def __init__(self, shelf: Shelf):
        self.shelf = shelf
        self._lock = threading.RLock()
        kinds = list(shelf.kinds.items())[:CHOICES]
        self._kind = _dropdown("kind", "all kinds", len(shelf), {name: len(places) for name, places in kinds})
        problems = {name: len(places) for name, places in shelf.problems.items()}
        self._problem = _dropdown("problem", "with or without", len(shelf), problems)
        self._back = widgets.Button(description="‹ previous", tooltip="previous record", layout={"width": "110px"})
        self._on = widgets.Button(description="next ›", tooltip="next record", layout={"width": "110px"})
        self._slider = widgets.IntSlider(description="record", min=1, max=1, continuous_update=False)
        self._slider.layout = widgets.Layout(width="420px")
        self._said, self._card = widgets.HTML(), widgets.HTML()
        self._places: Sequence[int] = ()
        self._shown: int | None = None
        filters = widgets.HBox([self._kind, self._problem], layout={"flex_flow": "row wrap"})
        steps = widgets.HBox([self._back, self._on, self._slider, self._said], layout={"flex_flow": "row wrap"})
        super().__init__([filters, steps, self._card])
        self._back.on_click(lambda _: self.go(-1))
        self._on.on_click(lambda _: self.go(1))
        for control in (self._kind, self._problem):
            control.observe(lambda _: self._filter(), "value")
        self._slider.observe(lambda _: self._show(), "value")
        self._filter()

    @property
    def kind(self) -> str | None:
        """The kind of record that is shown; None for all. ValueError for one that is not offered."""
        return self._kind.value or None

    @kind.setter
    def kind(self, name: str | None) -> None:
        self._kind.value = name or ALL

    @property
    def problem(self) -> str | None:
        """The kind of problem that is shown; None for records with and without."""
        return self._problem.value or None

    @problem.setter
    def problem(self, name: str | None) -> None:
        self._problem.value = name or ALL

    @traitlets.validate("position")
    def _among_places(self, proposal) -> int:
        if proposal["value"] not in self._places:
            raise traitlets.TraitError(
                f"position {proposal['value']} is none of the {len(self._places):,} that the filters leave"
            )
        return proposal["value"]

    @traitlets.observe("position")
    @_alone
    def _follow(self, change) -> None:
        if change["new"] is not None:
            self._slider.value = self._places.index(change["new"]) + 1

    @_alone
    def go(self, steps: int) -> None:
        """Go `steps` further among what the filters leave, not beyond its ends."""
        self._slider.value += steps  # the slider keeps within its ends

    @_alone
    def _filter(self) -> None:
        self._places = self.shelf.chosen(self.kind, self.problem)
        self._slider.value = 1  # first: a browser told of a lower end clips the old value to it and sends that back
        self._slider.max = max(1, len(self._places))
        for control in (self._slider, self._back, self._on):
            control.disabled = len(self._places) < 2
        self._show()

    @_alone
    def _show(self) -> None:
        if not len(self._places):
            self.position = self.item = self._shown = None
            self._said.value = f'<span style="{MUTED}">no record is of this kind and has this problem</span>'
            self._card.value = ""
            return
        number = min(self._slider.value, len(self._places))  # its end comes after the first of a new filter is shown
        self._said.value = f'<span role="status">{number:,} of {len(self._places):,}</span>'
        place = self._places[number - 1]
        if place != self._shown:
            self._shown, self.item = place, self.shelf[place]
            self._card.value = str(card(self.shelf, place))
            self.position = place  # last: who observes it finds the rest in place


def _dropdown(name: str, all_of_them: str, total: int, counts: dict[str, int]) -> widgets.Dropdown:
    options = [(f"{all_of_them} ({total:,})", ALL)]
    options += [(f"{one_line(choice, 60)} ({count:,})", choice) for choice, count in counts.items()]
    return widgets.Dropdown(options=options, description=name, layout={"width": "320px"})


def _page(shelf: Shelf, cards: int) -> str:
    """The first cards of each filter, each filter a section that folds; the first is open."""
    kinds = list(shelf.kinds.items())
    parts = [_section(shelf, name, places, cards, unfolded=not at) for at, (name, places) in enumerate(kinds[:KINDS])]
    if len(kinds) > KINDS:
        rest = sum(len(places) for _, places in kinds[KINDS:])
        parts.append(f'<div style="{MUTED}">… {len(kinds) - KINDS:,} more kinds with {rest:,} records</div>')
    parts += [_section(shelf, f"⚠ {name}", places, cards) for name, places in shelf.problems.items()]
    return f'<div style="{FONT}">{"".join(parts)}</div>'


def _section(shelf: Shelf, name: str, places: Sequence[int], cards: int, *, unfolded: bool = False) -> str:
    count = f"{len(places):,} {'record' if len(places) == 1 else 'records'}"
    count += f", the first {cards}" if len(places) > cards else ""
    shown = "".join(str(card(shelf, place)) for place in places[:cards])
    return (
        f'<details{" open" if unfolded else ""} style="margin:4px 0"><summary style="cursor:pointer"><b>'
        f'{words(name, 60)}</b> <span style="{MUTED}">{count}</span></summary>{shown}</details>'
    )
