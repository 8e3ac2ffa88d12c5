"""Images as a model's inputs: decoded once to bytes, augmented and normalised batch by batch.

Augmentation draws from a generator seeded by the run's seed and the batch's own row numbers. The shuffle makes batches
differ between epochs, so the augmentation does too, and a resumed run, which skips batches without loading them, meets
the same images again. Neither the global random state nor a counter could promise that: the loader runs a batch ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from eval.data.dataset import PreparedData, TaskData
from eval.data.files import Source
from eval.modeling.bundle import ModelBundle, Pixels
from quant.errors import UserError

MEMORY_LIMIT = 2**30
"""bytes of decoded images that are kept; larger sets are decoded at each access"""
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, Image.DecompressionBombError)
"""what PIL and datasets raise for files that are no images, end early, or are None"""


@dataclass(frozen=True)
class View:
    """How stored bytes become a model's input."""

    window: int
    """side of the square that is cut out of a stored image"""
    size: int
    """side of the model's input; the window is resized to it"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    """black border that the window may reach into when augmenting"""
    flip: bool = False


class Images(Protocol):
    """Decoded images, uint8 (N, C, side, side), indexed by a list of rows."""

    def __getitem__(self, rows: list[int]) -> Tensor: ...


class ImageDataset(Dataset):
    """Items `{"pixel_values": float32 (C, size, size), "labels": int64 ()}`.

    Batches are made whole in `__getitems__`, which torch's loader calls with the row numbers of a batch.
    """

    def __init__(
        self, images: Images, labels: Tensor, view: View, augment: bool, seed: int, rows: Tensor | None = None
    ):
        self.images, self.labels, self.view, self.augment, self.seed = images, labels, view, augment, seed
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> ImageDataset:
        """The given items; they share the decoded images."""
        kept = torch.as_tensor(np.asarray(indices), dtype=torch.long)
        return ImageDataset(self.images, self.labels[kept], self.view, self.augment, self.seed, self.rows[kept])

    def without_augmentation(self) -> ImageDataset:
        """The same items, always seen alike."""
        return ImageDataset(self.images, self.labels, self.view, False, self.seed, self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        rows = self.rows[indices].tolist()
        images = self.images[rows]
        if self.augment:
            images = augment(images, self.view, np.random.default_rng([self.seed, *rows]))
        pixels = to_input(images, self.view)
        return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, self.labels[indices], strict=True)]


def augment(images: Tensor, view: View, random: np.random.Generator) -> Tensor:
    """Windows (B, C, window, window) at a random place of each padded image (B, C, side, side), half of
    them mirrored."""
    padded = functional.pad(images, [view.padding] * 4)
    places = padded.shape[-1] - view.window + 1
    top, left = torch.from_numpy(random.integers(0, places, (2, len(images))))
    span = torch.arange(view.window)
    down, across = top[:, None] + span, left[:, None] + span
    if view.flip:
        mirrored = torch.from_numpy(random.random(len(images)) < 0.5)
        across = torch.where(mirrored[:, None], across.flip(1), across)
    batch = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def to_input(images: Tensor, view: View) -> Tensor:
    """uint8 (B, C, side, side) -> float32 (B, C, size, size): the central window, normalised, resized."""
    margin = (images.shape[-1] - view.window) // 2
    window = images[..., margin : margin + view.window, margin : margin + view.window]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (view.mean, view.std))
    pixels = (window.float() / 255 - mean) / std
    if view.size != view.window:
        pixels = functional.interpolate(pixels, size=(view.size, view.size), mode="bilinear", align_corners=False)
    return pixels.contiguous()


@dataclass(frozen=True)
class Decoder:
    """A row's image as uint8 (C, side, side): the shorter side resized to `side` where it differs, the middle kept."""

    side: int
    channels: int
    resample: int

    def __call__(self, image: Image.Image) -> Tensor:
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != (self.side, self.side):
            scale = self.side / min(image.size)
            width, height = (max(self.side, round(length * scale)) for length in image.size)
            left, top = (width - self.side) // 2, (height - self.side) // 2
            image = image.resize((width, height), self.resample).crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(image)).reshape(self.side, self.side, -1).permute(2, 0, 1)


@dataclass(frozen=True)
class StoredImages:
    """A split's images, decoded at each access."""

    split: Any
    column: str
    source: Source
    decode: Decoder

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.stack([self.decode(read_image(self.split, self.column, self.source, row)) for row in rows])

    def in_memory(self) -> Images:
        """All of them decoded now, where they fit."""
        shape = (len(self.split), self.decode.channels, self.decode.side, self.decode.side)
        if math.prod(shape) > MEMORY_LIMIT:
            return self
        stored = torch.empty(shape, dtype=torch.uint8)
        for row in range(len(self.split)):
            stored[row] = self[[row]][0]
        return stored


def read_image(split: Any, column: str, source: Source, row: int) -> Image.Image:
    """The image of a row; UserError that names its file where it is none."""
    try:
        value = split[row][column]
        return value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value, dtype=np.uint8))
    except BROKEN_IMAGE as error:
        from datasets import Image as Encoded

        file = (split.cast_column(column, Encoded(decode=False))[row][column] or {}).get("path")
        place = file if file in source.files else f"{source.place(row)}, column {column}"
        raise UserError(f"{place}: is not an image that can be read") from error


def native_side(split: Any, column: str, source: Source) -> int | None:
    """The side of the split's images where the first ones are all the same square, else None."""
    sizes = {read_image(split, column, source, row).size for row in range(min(len(split), 64))}
    width, height = next(iter(sizes))
    return width if len(sizes) == 1 and width == height else None


def prepare_images(data: TaskData, bundle: ModelBundle, config: Any) -> PreparedData:
    """Images no larger than the model's input keep their own size until a batch is made: 32x32 images for a 224x224
    model are cropped with a 4 pixel border and then enlarged. Larger ones are stored at input size / crop_fraction."""
    (column,) = data.columns
    native = native_side(data.train, column, data.sources["train"])
    size = bundle.image_size or native
    if size is None:
        raise UserError("--image_size: is needed, the images of this task differ in size and the model takes any")
    small = native is not None and native <= size
    side = native if native is not None and small else round(size / bundle.crop_fraction)
    view = View(side if small else size, size, bundle.mean, bundle.std, padding=4 if small else 0, flip=True)
    decode = Decoder(side, bundle.in_channels, bundle.resample)
    augmented = data.task.augmented and getattr(config, "augment", True)

    def dataset(name: str, split: Any, augmented: bool) -> ImageDataset:
        images = StoredImages(split, column, data.sources[name], decode).in_memory()
        labels = torch.tensor(split[data.task.label][:], dtype=torch.long)
        return ImageDataset(images, labels, view, augmented, getattr(config, "seed", 0))

    train = dataset("train", data.train, augmented)
    validation = {name: dataset(name, split, False) for name, split in data.validation.items()}
    example = {"pixel_values": torch.zeros(1, bundle.in_channels, size, size)}
    mean, std = tuple(view.mean), tuple(view.std)
    pixels = Pixels(side, view.window, size, bundle.in_channels, mean, std, int(bundle.resample))
    return PreparedData(train, validation, collate_images, example, pixels=pixels)


def collate_images(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`pixel_values` (B, C, size, size) and `labels` (B,)."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
