from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovisnb.data import boxes

unit = st.floats(0, 1, allow_nan=False)


@st.composite
def normalised_boxes(draw):
    x1, x2 = sorted(draw(st.tuples(unit, unit)))
    y1, y2 = sorted(draw(st.tuples(unit, unit)))
    return (x1, y1, x2, y2)


def test_pixels_and_normalised_are_told_by_the_size():
    assert boxes.normalise((32, 16, 64, 48), (128, 64)) == (0.25, 0.25, 0.5, 0.75)
    assert boxes.to_pixels((0.25, 0.25, 0.5, 0.75), (128, 64)) == (32, 16, 64, 48)


@given(normalised_boxes(), st.integers(1, 5000), st.integers(1, 5000))
def test_there_and_back(box, width, height):
    back = boxes.normalise(boxes.to_pixels(box, (width, height)), (width, height))
    assert back == pytest.approx(box, abs=1e-9)


@given(normalised_boxes(), normalised_boxes())
def test_iou_is_symmetric_and_bounded(a, b):
    assert boxes.iou(a, b) == boxes.iou(b, a)
    assert 0 <= boxes.iou(a, b) <= 1 + 1e-9
    if boxes.area(a) > 1e-12:
        assert boxes.iou(a, a) == pytest.approx(1)


def test_iou_by_hand():
    assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0  # they touch
    assert boxes.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_written_as_ovis_writes_it():
    assert boxes.format_box((0.123, 0.4561, 0.7, 1.0)) == "<box>(0.123,0.456),(0.700,0.999)</box>"
    assert boxes.format_point((0.5, -0.001)) == "<point>(0.500,0.000)</point>"


@pytest.mark.parametrize("wrong", [(12, 30, 40, 50), (math.nan, 0, 0.5, 0.5)])
def test_pixels_are_not_written_as_normalised(wrong):
    with pytest.raises(ValueError, match="divide pixels by the size"):
        boxes.format_box(wrong)


def test_crop_is_clipped_and_grown_to_whole_pixels():
    assert boxes.crop_bounds((-5, 1.5, 10.2, 99), (64, 48)) == (0, 1, 11, 48)
    with pytest.raises(ValueError, match="outside the picture of 64x48"):
        boxes.crop_bounds((70, 0, 80, 10), (64, 48))


def test_clip_and_area():
    assert boxes.clip((-0.5, 0.2, 0.5, 1.7)) == (0, 0.2, 0.5, 1)
    assert boxes.area(boxes.clip((2, 2, 3, 3))) == 0
    assert boxes.area((3, 3, 2, 2)) == 0


@pytest.mark.parametrize("wrong", [(1, 2, 3), (1, 2, 1, 3), (1, 5, 2, 3), (0, 0, math.inf, 1)])
def test_what_is_no_box(wrong):
    with pytest.raises(ValueError, match="a box"):
        boxes.checked(wrong)


def test_a_size_is_above_zero():
    with pytest.raises(ValueError, match="above 0"):
        boxes.normalise((0, 0, 1, 1), (0, 10))
