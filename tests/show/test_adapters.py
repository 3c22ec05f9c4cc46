"""What an adapter trains and how far it moved: every number is in the picture."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ovisnb.show import show_shares, show_updates


@dataclass
class Update:
    part: str
    layer: int | None
    projection: str
    ratio: float


LLM = [Update("llm", layer, name, 0.1 * layer + 0.01) for layer in range(3) for name in ("q_proj", "up_proj")]
VIT = [Update("visual_tokenizer.vit", layer, "fc1", 0.02) for layer in range(30)]
TABLE = [Update("vte", None, "visual_embeddings_table", 0.05)]


def maps(plot) -> dict:
    """part -> (projections, layers, cells) of every map."""
    found = {}
    for axis in plot.figure.axes:
        if axis.images and axis.get_title():
            names = [label.get_text() for label in axis.get_yticklabels()]
            found[axis.get_title()] = (names, axis.images[0].get_array())
    return found


def test_each_part_has_a_map_of_its_layers_and_the_rest_bars():
    plot = show_updates([*VIT, *LLM, *TABLE])
    found = maps(plot)
    assert set(found) == {"llm", "visual_tokenizer.vit"}
    names, cells = found["llm"]
    assert names == ["q_proj", "up_proj"] and cells.shape == (2, 3)
    assert cells.tolist() == [[pytest.approx(0.1 * layer + 0.01) for layer in range(3)]] * 2
    assert found["visual_tokenizer.vit"][1].shape == (1, 30)
    (bars,) = [axis for axis in plot.figure.axes if axis.get_title() == "in no layer"]
    assert [bar.get_width() for bar in bars.patches] == [0.05]
    limits = {axis.images[0].get_clim() for axis in plot.figure.axes if axis.images and axis.get_title()}
    assert limits == {(0, LLM[-1].ratio)}  # one scale
    assert plot._repr_png_()[0].startswith(b"\x89PNG")


def test_few_cells_hold_their_numbers_and_many_do_not():
    few, many = show_updates(LLM), show_updates([Update("llm", n, "q_proj", 0.1) for n in range(100)])
    assert {text.get_text() for text in few.figure.axes[0].texts} == {"0.01", "0.11", "0.21"}
    assert not many.figure.axes[0].texts


def test_a_projection_that_some_layers_lack_leaves_a_hole():
    plot = show_updates([*LLM, Update("llm", 1, "gate", 0.2)])
    assert maps(plot)["llm"][1].mask.sum() == 2
    assert show_updates(TABLE)._repr_png_()[0]  # bars alone
    assert show_updates([Update("llm", 0, "q_proj", 0.0)])._repr_png_()[0]  # nothing moved yet


def test_nothing_adapted_is_said():
    with pytest.raises(ValueError, match="no updates to show"):
        show_updates([])


def test_the_shares_are_a_table_with_a_sum():
    source = str(show_shares({"llm": (10, 1_000), "visual_tokenizer.vit": (0, 500), "vte": (500, 500)}))
    assert "1.00 %" in source and "0.00 %" in source and "100.00 %" in source
    assert "<td" in source and ">all<" in source and ">510<" in source and ">2,000<" in source and "25.50 %" in source
