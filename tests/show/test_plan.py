"""The view of a memory plan: static, escaped, drawn to the size of the card."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from ovisnb.show.plan import show_plan
from ovisnb.train.plan import MemoryPlan
from ovisnb.train.plan_batch import Load


@pytest.fixture
def plan():
    inputs = {"input_ids": torch.zeros(1, 90, dtype=torch.int64), "labels": torch.zeros(1, 90, dtype=torch.int64)}
    parts = {"weights": 4 * 2**30, "gradients": 2 * 2**30, "logits": 2 * 2**30, "batch": 2**20}
    return MemoryPlan(
        parts=parts,
        formulas=dict.fromkeys(parts, "of <b>numbers</b>"),
        when="backward",
        peaks={"forward and backward": sum(parts.values())},
        batch=Load(inputs, {}, 1, "<script>"),
        mean=2**30,
        device="cuda",
        parallel="one process",
    )


def widths(source: str) -> list[float]:
    return [float(width) for width in re.findall(r"width:([\d.]+)%", source)]


def test_the_bar_is_full_with_the_peak_and_small_parts_are_put_together(plan):
    source = str(show_plan(plan))
    assert sum(widths(source)) == pytest.approx(100, abs=0.1)
    assert len(widths(source)) == 4 and "<bdi>rest</bdi>" in source
    assert "8.00 GiB" in source and "1.00 GiB with a middling batch" in source


def test_the_bar_is_drawn_to_the_card(plan):
    fits, not_fits = (str(show_plan(plan, gpu_memory=size)) for size in (16, 8))
    assert sum(widths(fits)) == pytest.approx(50, abs=0.1)
    assert "it fits on a card of 16 GiB" in fits
    assert "it does not fit on a card of 8 GiB" in not_fits


def test_nothing_of_it_is_markup_or_script(plan):
    source = str(show_plan(replace(plan, when="<i>", parallel="<u>")))
    assert not re.search(r"<(script|b>numbers|i>|u>)", source)
    assert "&lt;script&gt;" in source
