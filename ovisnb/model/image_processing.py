"""Pictures and frames to patches, the Ovis2.5 way: PIL and numpy only.

`smart_resize` chooses the target size, `Ovis2_5ImageProcessor` resizes, normalises and cuts patches so that
the four patches of one merged 2x2 block are neighbours.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Target (height, width) in pixels, both multiples of `factor` and at least `factor`.

    The aspect ratio is kept as far as the grid allows, the area is brought into [min_pixels, max_pixels].
    Differs from the original in one case: an extreme sliver never floors to a side of 0.
    """
    if height < 1 or width < 1:
        raise ValueError(f"An image of {width}x{height} pixels has no area; leave it out of the data.")
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = (factor, round(width * scale)) if height <= width else (round(height * scale), factor)
    elif max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        if height > width:
            height = width * MAX_ASPECT_RATIO
        else:
            width = height * MAX_ASPECT_RATIO
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height, new_width = (math.floor(side / beta / factor) * factor for side in (height, width))
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return max(new_height, factor), max(new_width, factor)


class Ovis2_5ImagesKwargs(ImagesKwargs, total=False):
    patch_size: int
    hidden_stride: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    image_mean: list[float]
    image_std: list[float]


class Ovis2_5ImageProcessor(BaseImageProcessor):
    """PIL images to `pixel_values` [patches, 3 * temporal_patch_size * patch_size**2] float32 in [-1, 1], and
    `image_grid_thw` [images, 3] int64, counted in patches.

    Args:
        patch_size: side of a patch in pixels.
        hidden_stride: patches of one visual token along each side.
        temporal_patch_size: frames of one patch.
        min_pixels, max_pixels: limits on the area of the resized picture, in pixels.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]
    valid_kwargs = Ovis2_5ImagesKwargs  # what from_pretrained may override

    def __init__(
        self,
        patch_size: int = 16,
        hidden_stride: int = 2,
        temporal_patch_size: int = 1,
        min_pixels: int = 448 * 448,
        max_pixels: int = 1344 * 1792,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.hidden_stride = hidden_stride
        self.temporal_patch_size = temporal_patch_size
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def limits(self, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
        """(min_pixels, max_pixels) with the processor's own where None is given; ValueError if they cross."""
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if low > high:
            raise ValueError(f"min_pixels {low} is above max_pixels {high}; give a min_pixels of at most {high}.")
        return low, high

    def grid(self, height: int, width: int, min_pixels: int | None = None, max_pixels: int | None = None):
        """(rows, columns) in patches that a picture of this size in pixels gets, without decoding it."""
        factor = self.patch_size * self.hidden_stride
        target = smart_resize(height, width, factor, *self.limits(min_pixels, max_pixels))
        return target[0] // self.patch_size, target[1] // self.patch_size

    def patchify(self, frames: list[Image.Image], rows: int, columns: int) -> np.ndarray:
        """Frames of one clip (a still image is one frame), all resized to rows x columns patches.

        Returns float32 [t * rows * columns, 3 * temporal_patch_size * patch_size**2] in the order
        (t, row block, column block, 2, 2).
        """
        size, stride, depth = self.patch_size, self.hidden_stride, self.temporal_patch_size
        target = (columns * size, rows * size)
        mean = np.asarray(self.image_mean, dtype=np.float32)
        std = np.asarray(self.image_std, dtype=np.float32)
        pixels = np.stack([np.asarray(f.convert("RGB").resize(target, Image.Resampling.BILINEAR)) for f in frames])
        pixels = (pixels.astype(np.float32) / 255 - mean) / std
        if missing := -len(pixels) % depth:
            pixels = np.concatenate([pixels, pixels[-1:].repeat(missing, axis=0)])
        pixels = pixels.transpose(0, 3, 1, 2)
        clips = len(pixels) // depth
        pixels = pixels.reshape(
            clips, depth, 3, rows // stride, stride, size, columns // stride, stride, size
        ).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return np.ascontiguousarray(pixels).reshape(clips * rows * columns, 3 * depth * size * size)

    def _clips(self, clips, min_pixels, max_pixels):
        """Patches and grids of clips, each at the target size of its first frame."""
        values, grids = [], []
        for frames in clips:
            width, height = frames[0].size
            rows, columns = self.grid(height, width, min_pixels, max_pixels)
            values.append(self.patchify(frames, rows, columns))
            grids.append([values[-1].shape[0] // (rows * columns), rows, columns])
        return np.concatenate(values), np.asarray(grids, dtype=np.int64)

    def preprocess(self, images, min_pixels=None, max_pixels=None, return_tensors=None) -> BatchFeature:
        """Patches of one picture or of a list of them (nested lists are flattened in order); a picture is a PIL image
        or a uint8 array [height, width, 3] or [3, height, width]."""
        images = [as_picture(image) for image in flatten(images)]
        if not images:
            raise ValueError("The image processor got an empty list of images; pass at least one picture.")
        values, grids = self._clips([[image] for image in images], min_pixels, max_pixels)
        return tensors({"pixel_values": values, "image_grid_thw": grids}, return_tensors)

    __call__ = preprocess


class Ovis2_5VideoProcessor:
    """The image processor applied to clips: frames in, `pixel_values_videos` and `video_grid_thw` out.

    Not a transformers video processor, because those need torchvision; it has no settings of its own.
    """

    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, image_processor: Ovis2_5ImageProcessor):
        self.image_processor = image_processor

    def __call__(self, videos, min_pixels=None, max_pixels=None, return_tensors=None) -> BatchFeature:
        """Patches of clips; `videos` is one clip or a (nested) list of clips, a clip a list of pictures or a uint8
        array [frames, height, width, 3]."""
        videos = list(clips_of(videos))
        if not videos or not all(videos):
            raise ValueError("The video processor got a video without frames; pass at least one frame a video.")
        values, grids = self.image_processor._clips(videos, min_pixels, max_pixels)
        return tensors({"pixel_values_videos": values, "video_grid_thw": grids}, return_tensors)


def as_picture(image) -> Image.Image:
    """A PIL image as it is, a uint8 array as one; TypeError, saying what was given, for anything else."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4):
            image = image.transpose(1, 2, 0)
        return Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image)
    given = f"{image.dtype} array of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise TypeError(f"A picture is a PIL image or a uint8 array [height, width, 3], not a {given}; open or convert it.")


def clips_of(videos):
    """The clips, lists of PIL frames, in one clip, a list of clips, or one list of clips a text."""
    if (
        isinstance(videos, np.ndarray)
        and videos.ndim == 4
        or isinstance(videos, (list, tuple))
        and videos
        and not _holds_clips(videos)
    ):
        yield [as_picture(frame) for frame in videos]
    elif isinstance(videos, (list, tuple, np.ndarray)):
        for item in videos:
            yield from clips_of(item) if len(item) else [[]]
    else:
        raise TypeError(f"A video is a list of frames, not a {type(videos).__name__}; read its frames first.")


def _holds_clips(videos) -> bool:
    first = videos[0]
    return isinstance(first, (list, tuple)) or (isinstance(first, np.ndarray) and first.ndim == 4)


def flatten(items):
    """The single items of arbitrarily nested lists, in order."""
    if isinstance(items, (list, tuple)):
        for item in items:
            yield from flatten(item)
    elif items is not None:
        yield items


def tensors(data: dict, return_tensors: str | None) -> BatchFeature:
    """A BatchFeature of numpy arrays, or of torch tensors that share their memory."""
    if str(getattr(return_tensors, "value", return_tensors)) == "pt":
        return BatchFeature({key: torch.from_numpy(value) for key, value in data.items()})
    return BatchFeature(data, tensor_type=return_tensors)
