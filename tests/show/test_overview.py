"""The set at a glance: the numbers that were counted, and no text of the data in a figure."""

from __future__ import annotations

import re
import warnings
from html import escape

import pytest

from ovisnb.chat import encode
from ovisnb.data import Record, shapes
from ovisnb.data.stats import summarise
from ovisnb.show import Shelf, kind_table, open_shelf, overview_figure, overview_table, problem_table

from .hostile import DOLLARS, write_hostile
from .page import elements, text_of

READ = next(shapes.records("heldout", seed=1, size=512, kinds={"read": 1}))
FIND = next(shapes.records("heldout", seed=1, size=64, kinds={"find": 1}))


def record(*turns: tuple[str, str], **more) -> Record:
    return Record.from_dict({"id": "test", "conversations": [{"from": r, "value": v} for r, v in turns], **more})


def panels(plot) -> dict:
    return {axis.get_title(): axis for axis in plot.figure.axes if axis.axison}


def test_the_table_and_the_figure_show_what_was_counted(golden_processor):
    records = [FIND, READ, record(("human", "q"), ("gpt", "a"))]
    stats = summarise(records, golden_processor)
    lengths = [len(encode(one, golden_processor).input_ids) for one in records]
    text = text_of(overview_table(stats, max_length=sorted(lengths)[1]))
    assert f"tokens{sum(lengths):,}" in text and "64×64, 512×512" in text
    assert f"records over {sorted(lengths)[1]:,} tokens1 (33.3%)" in text
    axes = panels(overview_figure(stats))
    assert list(axes) == [
        "Turns and images a record",
        "Picture sizes",
        "Length of a record",
        "Where boxes, points and calls lie",
        "Area of a box",
        "Tool calls an answer",
    ]
    assert len(axes["Picture sizes"].collections[0].get_offsets()) == len(set(stats.sizes))
    assert sum(bar.get_height() for bar in axes["Length of a record"].patches) == 3
    assert sum(bar.get_height() for bar in axes["Area of a box"].patches) == 2
    assert sorted(bar.get_height() for bar in axes["Tool calls an answer"].patches) == [1, 2]
    assert len(axes["Where boxes, points and calls lie"].collections[0].get_paths()) == 1


@pytest.mark.parametrize("records", [[FIND], [FIND, READ], [FIND] * 5 + [READ]])
def test_no_legend_lies_on_a_bar(golden_processor, records):
    plot = overview_figure(summarise(records, golden_processor))
    plot.figure.draw_without_rendering()
    for title in ("Turns and images a record", "Area of a box"):
        axis = panels(plot)[title]
        legend = axis.get_legend().get_window_extent()
        assert not any(legend.overlaps(bar.get_window_extent()) for bar in axis.patches if bar.get_height()), title


def test_the_limit_is_drawn_where_it_lies_and_says_how_many_are_over(golden_processor):
    stats = summarise([FIND, READ], golden_processor)
    limit = max(stats.tokens) - 1
    axis = panels(overview_figure(stats, max_length=limit))[f"Length of a record: 1 over {limit:,}"]
    assert axis.lines[0].get_xdata() == [limit, limit]
    far = panels(overview_figure(stats, max_length=100 * limit))[f"Length of a record: all within {100 * limit:,}"]
    assert far.get_xlim()[1] < 2 * limit  # the line is out of sight, and the bars can be seen


def test_the_limits_of_the_resized_picture_are_drawn_among_the_sizes():
    stats = summarise([READ])
    axis = panels(overview_figure(stats, limits=(100 * 100, 10**9)))["Picture sizes"]
    [line] = axis.lines
    assert line.get_label() == "min_pixels"
    assert {round(x * y) for x, y in zip(*line.get_data())} == {100 * 100}


def test_an_overview_of_text_alone_or_of_nothing_is_drawn():
    for records in ([record(("human", "q"), ("gpt", "a"))], []):
        stats = summarise(records)
        assert text_of(overview_table(stats)).startswith(f"records{len(records)}")
        assert list(panels(overview_figure(stats))) == ["Turns and images a record"]
        assert overview_figure(stats)._repr_png_()[0][:4] == b"\x89PNG"
        assert elements(kind_table(stats)) <= {"div", "table", "tr", "th", "td", "bdi"}


def test_kinds_are_listed_by_frequency_as_text():
    evil = "<img src=x onerror=y> $x^2$ 種類"
    stats = summarise([record(("human", "q"), kind=kind) for kind in (evil, "b", evil)])
    html = str(kind_table(stats))
    assert "img" not in elements(html) and html.index(escape(evil)) < html.index(">b<")
    many = summarise([record(("human", "q"), kind=str(at)) for at in range(50)])
    assert "… 30 more kinds" in text_of(kind_table(many))


def test_problems_are_listed_by_kind_with_the_first_of_each(tmp_path):
    shelf = open_shelf(write_hostile(tmp_path), image_folder=tmp_path / "images").check()
    html = problem_table(shelf)
    text = text_of(html)
    assert elements(html) <= {"div", "span", "b", "bdi", "table", "tr", "td"}
    for kind, count in shelf.counts.items():
        assert f"{kind}{count}" in text
    assert "picture-0, line 1" in text
    assert re.search(r"alert\(.*…, line 23 ?the key", text)  # a long id does not push the line out
    assert all(
        f'white-space:nowrap;padding:2px 10px 2px 0;vertical-align:top">{kind}<' in str(html) for kind in shelf.counts
    )


def test_a_shelf_without_problems_says_so():
    assert "nothing wrong" not in text_of(problem_table(Shelf([FIND])))
    assert "Pictures not checked: 0 problems" in text_of(problem_table(Shelf([FIND])))


def test_the_table_says_how_much_of_the_file_was_read():
    shelf = Shelf([FIND], read="an even sample of 1 of 9 rows")
    assert "records1 (an even sample of 1 of 9 rows)" in text_of(overview_table(summarise([FIND]), shelf))
    assert text_of(overview_table(summarise([FIND]), Shelf([FIND]))).startswith("records1pictures")


def test_nothing_that_the_data_wrote_gets_into_a_figure(tmp_path, golden_processor):
    shelf = open_shelf(write_hostile(tmp_path), image_folder=tmp_path / "images")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, a broken formula
        stats = summarise(shelf.records, golden_processor, image_folder=tmp_path / "images")
        plot = overview_figure(stats, max_length=10, limits=(100, 1000))
        plot._repr_png_()
    words = [text.get_text() for text in plot.figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert DOLLARS in stats.kinds and not [word for word in words if "<" in word or "frac" in word]
    table = text_of(overview_table(stats, shelf))
    assert "records not counted in full7" in table and table.count("⚠") == 3 and "4 more records are not shown" in table


@pytest.mark.parametrize("sizes", [[(65535, 1), (10, 10)], [(1, 1)]])
def test_sizes_far_apart_are_drawn_too(sizes):
    stats = summarise([])
    for size in sizes:
        stats.add_size(size)
    axis = panels(overview_figure(stats, limits=(4, 400)))["Picture sizes"]
    assert axis.get_xscale() == ("log" if len(sizes) > 1 else "linear")


def test_numbers_far_out_share_a_bar():
    stats = summarise([record(*[("human", "q")] * turns) for turns in (1, 1, 500, 900)])
    bars = [bar for bar in panels(overview_figure(stats))["Turns and images a record"].patches if bar.get_height()]
    assert sorted((round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in bars) == [
        (0, 4),
        (1, 2),
        (13, 2),
    ]
