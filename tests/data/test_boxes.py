from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovisnb.data import boxes

unit = st.floats(0, 1, allow_nan=False)


@st.composite
def normalised_boxes(draw):
    x1, x2 = sorted(draw(st.tuples(unit, unit)))
    y1, y2 = sorted(draw(st.tuples(unit, unit)))
    return (x1, y1, x2, y2)


def test_pixels_and_normalised_are_told_by_the_size():
    assert boxes.convert((32, 16, 64, 48), "pixels", "normalised", (128, 64)) == (0.25, 0.25, 0.5, 0.75)
    assert boxes.convert((0.25, 0.25, 0.5, 0.75), "normalised", "pixels", (128, 64)) == (32, 16, 64, 48)


@given(normalised_boxes(), st.integers(1, 5000), st.integers(1, 5000))
def test_there_and_back(box, width, height):
    pixels = boxes.convert(box, "normalised", "pixels", (width, height))
    back = boxes.convert(pixels, "pixels", "normalised", (width, height))
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
    with pytest.raises(ValueError, match="which counts pixels or 0 to 1000"):
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
        boxes.convert((0, 0, 1, 1), "pixels", "normalised", (0, 10))


sizes = st.tuples(st.integers(1, 20_000), st.integers(1, 20_000))
conventions = st.sampled_from(boxes.CONVENTIONS)
# What one step of the last written digit is worth, in shares of the picture.
STEP = {"normalised": lambda side: 0.001, "thousand": lambda side: 0.001, "pixels": lambda side: 0.01 / side}


def test_three_conventions_of_one_box():
    size, pixels = (640, 480), (64, 96, 192, 192)
    assert boxes.convert(pixels, "pixels", "normalised", size) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert boxes.convert(pixels, "pixels", "thousand", size) == pytest.approx((100, 200, 300, 400))
    assert boxes.convert((0.1, 0.2, 0.3, 0.4), "normalised", "thousand") == pytest.approx((100, 200, 300, 400))
    assert boxes.convert_point((500, 250), "thousand", "pixels", size) == (320, 120)
    assert boxes.convert(pixels, "pixels", "pixels") == pixels  # no size needed for the way to itself


def test_what_converting_needs():
    with pytest.raises(ValueError, match="need the picture's size"):
        boxes.convert((1, 2, 3, 4), "pixels", "thousand")
    with pytest.raises(ValueError, match="pixels, normalised or thousand, not 'percent'"):
        boxes.convert((1, 2, 3, 4), "percent", "thousand")
    with pytest.raises(ValueError, match="not 'normalized'"):
        boxes.convert_point((1, 2), "normalised", "normalized")


@given(normalised_boxes(), conventions, conventions, sizes)
def test_converting_comes_back(box, of, to, size):
    there = boxes.convert(box, "normalised", of, size)
    assert boxes.convert(boxes.convert(there, of, to, size), to, of, size) == pytest.approx(there, rel=1e-9, abs=1e-9)


@given(normalised_boxes(), conventions, sizes)
def test_writing_is_true_to_its_last_digit(box, convention, size):
    written = boxes.write_numbers(boxes.convert(box, "normalised", convention, size), convention)
    back = boxes.convert([float(number) for number in written], convention, "normalised", size)
    for number, expected, side in zip(back, box, size * 2):
        # pixels close to whole ones may be written whole
        assert abs(number - expected) <= STEP[convention](side) + 1e-9


@given(normalised_boxes(), conventions, sizes)
def test_what_is_written_is_written_the_same_again(box, convention, size):
    once = boxes.write_numbers(boxes.convert(box, "normalised", convention, size), convention)
    assert boxes.write_numbers([float(number) for number in once], convention) == once


@pytest.mark.parametrize(
    ("numbers", "convention", "written"),
    [
        ((10, 20, 100, 200.0), "pixels", "10 20 100 200"),
        ((0, 141.43, 79.23, 480), "pixels", "0.00 141.43 79.23 480.00"),
        ((-0.001, 141.43), "pixels", "0.00 141.43"),
        ((-5, 3), "pixels", "-5 3"),
        ((0.1, 0.25, 1.0), "normalised", "0.100 0.250 0.999"),
        ((99.6, 1000.4, -0.4), "thousand", "100 1000 0"),
    ],
)
def test_numbers_as_each_convention_writes_them(numbers, convention, written):
    assert " ".join(boxes.write_numbers(numbers, convention)) == written


@pytest.mark.parametrize(
    ("number", "convention"),
    [(math.nan, "pixels"), (math.inf, "thousand"), (1200, "thousand"), (3, "normalised"), (1, "percent")],
)
def test_what_no_convention_writes(number, convention):
    with pytest.raises(ValueError):
        boxes.write_numbers([number], convention)


@given(normalised_boxes(), sizes, sizes)
def test_boxes_survive_resizing(box, size, smaller):
    pixels = boxes.convert(box, "normalised", "pixels", size)
    resized = boxes.scaled(pixels, size, smaller)
    assert boxes.convert(resized, "pixels", "normalised", smaller) == pytest.approx(box, abs=1e-9)
    assert boxes.scaled(resized, smaller, size) == pytest.approx(pixels, rel=1e-9, abs=1e-6)


@given(st.tuples(*[st.floats(-50, 250)] * 4), st.tuples(*[st.integers(0, 100)] * 4), st.integers(1, 4))
def test_a_box_inside_a_crop_maps_back(corners, inner, zoom):
    x1, x2, y1, y2 = *sorted(corners[:2]), *sorted(corners[2:])
    size = (200, 160)
    crop = (x1, y1, x2, y2)
    if boxes.area(boxes.clip(crop, size)) == 0:
        return
    left, top, right, bottom = boxes.crop_bounds(crop, size)
    cut = (right - left, bottom - top)
    shares = (*sorted(inner[::2]), *sorted(inner[1::2]))
    box = boxes.Box(*(cut[i % 2] * shares[(0, 2, 1, 3)[i]] / 100 for i in range(4)))  # inside the crop, in its pixels
    outside = boxes.out_of_crop(box, crop)
    assert left <= outside.x1 and top <= outside.y1 and outside.x2 <= right + 1e-9 and outside.y2 <= bottom + 1e-9
    assert boxes.into_crop(outside, crop) == pytest.approx(box)
    enlarged = (cut[0] * zoom, cut[1] * zoom)  # and through a crop that was resized before it was looked at
    seen = boxes.scaled(boxes.into_crop(outside, crop), cut, enlarged)
    assert boxes.out_of_crop(boxes.scaled(seen, enlarged, cut), crop) == pytest.approx(outside)


def test_a_crop_of_a_real_picture_holds_the_pixel_that_the_box_says():
    image = Image.new("L", (64, 48))
    image.putpixel((20, 30), 255)
    crop = (10.7, 12.2, 40.1, 40)
    cut = image.crop(boxes.crop_bounds(crop, image.size))
    x, y, *_ = boxes.into_crop((20, 30, 21, 31), crop)
    assert cut.getpixel((round(x), round(y))) == 255


@pytest.mark.parametrize(
    "numbers, of, refused",
    [
        ((0.1, 0.1, 0.5, 0.5), "pixels", True),
        ((0.1, 0.1, 0.5, 0.5), "thousand", True),
        ((0, 0, 1, 1), "pixels", True),  # the whole picture far more often than its corner pixel
        ((0.5, 0.5), "pixels", True),
        ((0.1, 0.1, 0.5, 0.5), "normalised", False),
        ((0.1, 0.1, 0.5, 1.5), "pixels", False),
        ((0, 0), "pixels", False),
    ],
)
def test_shares_of_a_picture_are_no_pixels(numbers, of, refused):
    assert bool(boxes.misread(numbers, of)) == refused
    if refused and of == "pixels" and len(numbers) == 4:
        with pytest.raises(ValueError, match="which are shares of a picture"):
            boxes.crop_bounds(numbers, (640, 480))
