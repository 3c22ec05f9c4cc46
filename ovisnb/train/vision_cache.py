"""Features of a frozen vision part, kept on disk from one epoch, and one run, to the next.

cache = VisionCache(model, "features")
model(**cache(batch))
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ovisnb.data.files import naming
from ovisnb.model import Ovis2_5Model
from ovisnb.model.loss import calls_are_counted
from ovisnb.model.vision import trains

KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


class VisionCache:
    """Puts `visual_features` [visual tokens, hidden_size] in the place of a batch's pixels.

    Every picture and every video is encoded on its own, under no_grad and without dropout, and kept in a file of its
    own: FOLDER/fingerprint/xx/key.safetensors, of 4 bytes (2 in bfloat16) x hidden_size a visual token. The key is a
    hash of its pixel values and its grid; the fingerprint one of the weights of vision tower and table, and of what
    else decides on numbers: dtypes, device, attention. Other weights find other files; nothing is ever deleted.

    On one machine the features are those that the model makes of a batch with this one picture, bit for bit. A batch
    of several is one matrix product there and several here, which may differ by rounding.

    `hits` and `misses` count pictures and videos that were read and that were encoded. Files are written whole or not
    at all, so several processes may share a folder; a damaged one is told, encoded again and replaced, and a full
    disk is told once, and then nothing is written any more.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`autocast` gives the context that the model's forward runs in. ValueError if vision parts train, where
        parameters lie on several ranks (ZeRO-3, FSDP), which must encode equally often, and for a folder that cannot
        be made."""
        self.model = next(module for module in model.modules() if isinstance(module, Ovis2_5Model))
        self.parts = (self.model.vision_tower, self.model.visual_embeddings_table)
        if any(trains(part) for part in self.parts):
            raise ValueError(
                "The vision cache keeps features of parts that do not change, and the vision tower or the visual "
                'embedding table trains: give train_modules "llm", or remove vision_cache.'
            )
        if calls_are_counted(*self.parts):
            raise ValueError(
                "The vision cache cannot be used where the vision tower's parameters lie on several ranks (ZeRO-3, "
                "FSDP), which must all encode equally often: remove vision_cache, or use ZeRO 0, 1 or 2."
            )
        self.autocast = autocast
        self.fingerprint = self._fingerprint()
        self.folder = Path(folder) / self.fingerprint
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"vision_cache {folder} is no folder that can be written ({error.strerror}): choose another."
            ) from error
        self.hits = self.misses = 0
        self.writes = True

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `visual_features` in the place of its pixels, its grids kept; itself if it has none."""
        made, batch = [], dict(batch)
        for pixels_key, grid_key in KINDS:
            pixels, grids = batch.pop(pixels_key, None), batch.get(grid_key)
            if pixels is not None:
                pieces = pixels.split(grids.prod(1).tolist())
                made += [self.features(piece, grid) for piece, grid in zip(pieces, grids, strict=True)]
        if made:
            device = self.model.visual_embeddings_table.weight.device
            batch["visual_features"] = torch.cat([piece.to(device) for piece in made])
        return batch

    def features(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """[visual tokens, hidden_size] of one picture or video: pixel_values [patches, 3*tp*patch**2], grid int64
        [3]; read, or else encoded and written."""
        digest = hashlib.blake2b(digest_size=20)
        digest.update(f"{pixel_values.dtype} {grid.tolist()}".encode())
        digest.update(_bytes(pixel_values))
        key = digest.hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        made = self._read(path)
        if made is not None:
            self.hits += 1
            return made
        self.misses += 1
        made = self._encode(pixel_values, grid)
        if self.writes:
            self._write(path, made)
        return made

    @torch.no_grad()
    def _encode(self, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        tower, device = self.model.vision_tower, self.model.visual_embeddings_table.weight.device
        training = tower.training
        tower.eval()
        try:
            with self.autocast():
                return self.model.get_visual_features(pixel_values.to(device), grid[None].to(device))
        finally:
            tower.train(training)

    def _read(self, path: Path) -> torch.Tensor | None:
        try:
            with safe_open(path, "pt") as file:
                made = file.get_tensor("features")
                if file.metadata()["digest"] == _digest(made):
                    return made
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, TypeError):
            pass
        print(f"{path} is damaged: its picture is encoded again", flush=True)
        return None

    def _write(self, path: Path, features: torch.Tensor) -> None:
        features = features.cpu().contiguous()
        # several processes, of several machines even, may write the same file
        unfinished = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with naming(path, unfinished):
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(save({"features": features}, {"digest": _digest(features)}))
                os.replace(unfinished, path)
        except OSError as error:
            self.writes = False
            print(f"no more features are written to the vision cache: {error}", flush=True)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        tower, device = self.model.vision_tower, self.model.visual_embeddings_table.weight.device.type
        with self.autocast():
            cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        config = {name: value for name, value in tower.config.to_dict().items() if name != "transformers_version"}
        attention = tower.config._attn_implementation
        digest.update(json.dumps([config, cast, device, attention], sort_keys=True, default=str).encode())
        for part in self.parts:
            for name, tensor in part.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _digest(features: torch.Tensor) -> str:
    return hashlib.blake2b(_bytes(features), digest_size=16).hexdigest()
