"""Regions on a picture: in the right place, in colours that differ, and with labels that can be read."""

from __future__ import annotations

import io
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from ovisnb.show import draw_regions, gallery, show_regions
from ovisnb.show.regions import COLOURS, SHARP, _overlap

Region = namedtuple("Region", "x1 y1 x2 y2 label")
Spot = namedtuple("Spot", "x y label")
GREY = Image.new("RGB", (200, 100), (128, 128, 128))
BOX = (0.25, 0.25, 0.75, 0.75)


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def where(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Bounds (x1, y1, x2, y2), inclusive, of the pixels of exactly this colour."""
    ys, xs = np.nonzero((np.asarray(image) == colour).all(-1))
    return (xs.min(), ys.min(), xs.max(), ys.max()) if len(xs) else None


@pytest.mark.parametrize("box", [BOX, Region(*BOX, None), (0.75, 0.75, 0.25, 0.25)])
def test_a_box_is_drawn_where_it_is(box):
    drawn = draw_regions(GREY, [box], width=200, height=100)
    assert drawn.size == (200 * SHARP, 100 * SHARP)
    assert where(drawn, rgb(COLOURS[0])) == (100, 50, 300, 150)
    assert drawn.getpixel((200, 100)) == (128, 128, 128)  # what is inside stays visible


def test_the_source_picture_is_left_alone():
    before = GREY.tobytes()
    draw_regions(GREY, [BOX], [(0.5, 0.5)], [BOX], width=200, height=100)
    assert GREY.tobytes() == before


def test_boxes_and_points_have_colours_of_their_own():
    drawn = draw_regions(GREY, [(0.1, 0.1, 0.3, 0.9), (0.4, 0.1, 0.6, 0.9)], [(0.8, 0.5)], width=200, height=100)
    bounds = [where(drawn, rgb(colour)) for colour in COLOURS[:3]]
    assert bounds[0][2] < bounds[1][0] < bounds[1][2] < bounds[2][0]
    x1, y1, x2, y2 = bounds[2]
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((320, 100), abs=1)


def test_truth_is_dashed_in_black_and_white():
    drawn = np.asarray(draw_regions(GREY, truth=[BOX], width=200, height=100))
    edge = drawn[50, 100:301]
    assert (edge == 0).all(-1).sum() > 60
    assert (edge == 255).all(-1).sum() > 60


@pytest.mark.parametrize(
    "box", [(0.3, 0.3, 0.7, 0.8), (0.0, 0.0, 0.5, 0.5), (0.6, 0.7, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)]
)
def test_a_label_lies_in_the_picture_and_beside_its_box_where_there_is_room(box):
    plain = draw_regions(GREY, [Region(*box, None)], width=400, height=200)
    drawn = draw_regions(GREY, [Region(*box, "cat")], width=400, height=200)
    ys, xs = np.nonzero((np.asarray(plain) != np.asarray(drawn)).any(-1))
    assert len(xs) > 200  # it is there, whole: at least 10 x 20 pixels
    if box != (0.0, 0.0, 1.0, 1.0):
        label = (xs.min(), ys.min(), xs.max(), ys.max())
        inside = (box[0] * 800, box[1] * 400, box[2] * 800, box[3] * 400)
        assert _overlap(label, inside) < 0.1 * (label[2] - label[0]) * (label[3] - label[1])


def test_labels_do_not_cover_each_other():
    close = [
        Region(0.40, 0.40, 0.45, 0.5, "first"),
        Region(0.46, 0.40, 0.51, 0.5, "second"),
        Region(0.40, 0.52, 0.45, 0.6, "third"),
    ]
    image = Image.new("RGB", (400, 400), "white")
    alone = [np.asarray(draw_regions(image, [region], width=400, height=400)) for region in close]
    sizes = [(frame != 255).any(-1).sum() for frame in alone]
    together = (np.asarray(draw_regions(image, close, width=400, height=400)) != 255).any(-1).sum()
    assert together > 0.9 * sum(sizes)


def test_crops_are_cut_from_the_original_at_full_resolution():
    image = Image.new("RGB", (1000, 500), "white")
    image.paste(Image.effect_mandelbrot((100, 50), (-2, -1, 1, 1), 60).convert("RGB"), (400, 200))
    small = show_regions(image, [(0.4, 0.4, 0.5, 0.5)], width=100).image
    beside = show_regions(image, [(0.4, 0.4, 0.5, 0.5)], crops=True, width=100).image
    assert beside.width > small.width
    crop = np.asarray(beside)[:, small.width :].astype(int)
    assert len(np.unique(crop.reshape(-1, 3), axis=0)) > 100  # the detail that the small picture has lost


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.5), (0.2, 0.2, 0.2001, 0.9), (-1, -1, -0.5, -0.5), (0.9, 0.9, 2, 2)])
def test_boxes_without_area_or_outside_do_no_harm(box):
    show_regions(GREY, [Region(*box, "thing")], crops=True, title="odd")


@pytest.mark.parametrize("size", [(1, 1), (4000, 3), (3, 4000)])
def test_odd_pictures_are_drawn(size):
    picture = show_regions(Image.new("L", size), [BOX], [(0.5, 0.5)], truth=[BOX], crops=True, title="t " * 400)
    assert picture.image.width > 0


def test_a_notebook_shows_it_at_half_its_stored_size():
    data, meta = show_regions(GREY, [BOX])._repr_jpeg_()
    stored = Image.open(io.BytesIO(data))
    assert stored.format == "JPEG"
    assert (meta["width"], meta["height"]) == (stored.width // SHARP, stored.height // SHARP)


def test_a_gallery_has_a_place_for_each_picture():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    items = [
        {"image": Image.new("RGB", (60, 40 + 10 * at), colour), "caption": f"IoU 0.{at}"}
        for at, colour in enumerate(colours)
    ]
    sheet = gallery(items, columns=3, tile=100).image
    bounds = [where(sheet, colour) for colour in colours]
    assert None not in bounds
    for a in range(5):
        for b in range(a):
            assert _overlap(bounds[a], bounds[b]) == 0
    assert bounds[0][0] < bounds[1][0] < bounds[2][0] and bounds[3][1] > bounds[0][3]
    below = np.asarray(sheet)[bounds[0][3] + 2 : bounds[3][1], : bounds[0][2]]
    assert (below.sum(-1) < 200).sum() > 50  # the caption's ink


def test_a_gallery_of_nothing_says_so():
    with pytest.raises(ValueError, match="at least one picture"):
        gallery([])
