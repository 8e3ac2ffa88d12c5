"""Prepares images as a model's inputs: decodes them once to uint8, then augments and normalises them per batch.

Augmentation uses a generator seeded by the run's seed and the batch's row numbers. Batches, and with them the
augmentation, differ between epochs because of the shuffle. A resumed run skips batches without loading them and still
gets the same images. The global random state or a counter would not ensure that, since the loader prefetches.
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
"""most bytes of decoded images to keep in memory; images of larger splits are decoded at each access"""
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, Image.DecompressionBombError)
"""what PIL and datasets raise for files that are no images, truncated, or None"""


@dataclass(frozen=True)
class View:
    """How a stored image is cropped, resized and normalised."""

    window: int
    """side of the square that is cropped from a stored image"""
    size: int
    """side of the model's input; the window is resized to it"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    """width of the black border for random crops"""
    flip: bool = False


class Images(Protocol):
    """Decoded images, uint8 (N, C, side, side), indexed by a list of rows."""

    def __getitem__(self, rows: list[int]) -> Tensor: ...


class ImageDataset(Dataset):
    """A dataset with items `{"pixel_values": float32 (C, size, size), "labels": int64 ()}`.

    `__getitems__`, which torch's DataLoader calls with the row numbers of a batch, processes the batch as a whole.

    Args:
        images: the decoded images.
        labels: int64 (N,).
        view: how images become inputs.
        augment: whether to crop and flip at random.
        seed: seed of the augmentation.
        rows: int64 (N,), the rows of `images` to use; None: all.
    """

    def __init__(
        self, images: Images, labels: Tensor, view: View, augment: bool, seed: int, rows: Tensor | None = None
    ):
        self.images, self.labels, self.view, self.augment, self.seed = images, labels, view, augment, seed
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> ImageDataset:
        """Return a dataset of the given items, which shares the decoded images."""
        kept = torch.as_tensor(np.asarray(indices), dtype=torch.long)
        return ImageDataset(self.images, self.labels[kept], self.view, self.augment, self.seed, self.rows[kept])

    def without_augmentation(self) -> ImageDataset:
        """Return the same items without augmentation."""
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
    """Crop each padded image at a random place, and flip half of them if `view.flip`.

    Args:
        images: uint8 (B, C, side, side).
        view: the window, padding and flip.
        random: the source of randomness.

    Returns:
        uint8 (B, C, window, window).
    """
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
    """Crop the central window, normalise and resize it: uint8 (B, C, side, side) -> float32 (B, C, size, size)."""
    margin = (images.shape[-1] - view.window) // 2
    window = images[..., margin : margin + view.window, margin : margin + view.window]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (view.mean, view.std))
    pixels = (window.float() / 255 - mean) / std
    if view.size != view.window:
        pixels = functional.interpolate(pixels, size=(view.size, view.size), mode="bilinear", align_corners=False)
    return pixels.contiguous()


@dataclass(frozen=True)
class Decoder:
    """Converts an image to uint8 (C, side, side): resizes its shorter side to `side`, then crops the center."""

    side: int
    channels: int
    resample: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert one image."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        if image.size != (self.side, self.side):
            scale = self.side / min(image.size)
            width, height = (max(self.side, round(length * scale)) for length in image.size)
            left, top = (width - self.side) // 2, (height - self.side) // 2
            image = image.resize((width, height), self.resample).crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(image)).reshape(self.side, self.side, -1).permute(2, 0, 1)


@dataclass(frozen=True)
class StoredImages:
    """The images of a split, decoded at each access."""

    split: Any
    column: str
    source: Source
    decode: Decoder

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.stack([self.decode(read_image(self.split, self.column, self.source, row)) for row in rows])

    def in_memory(self) -> Images:
        """Decode all images now if they fit into `MEMORY_LIMIT`; else return self."""
        shape = (len(self.split), self.decode.channels, self.decode.side, self.decode.side)
        if math.prod(shape) > MEMORY_LIMIT:
            return self
        stored = torch.empty(shape, dtype=torch.uint8)
        for row in range(len(self.split)):
            stored[row] = self[[row]][0]
        return stored


def read_image(split: Any, column: str, source: Source, row: int) -> Image.Image:
    """Read the image of a row.

    Args:
        split: a `datasets.Dataset`.
        column: the column of the image.
        source: where the rows come from, for errors.
        row: the row's number.

    Raises:
        UserError: names the file if it is not a readable image.
    """
    try:
        value = split[row][column]
        return value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value, dtype=np.uint8))
    except BROKEN_IMAGE as error:
        from datasets import Image as Encoded

        file = (split.cast_column(column, Encoded(decode=False))[row][column] or {}).get("path")
        place = file if file in source.files else f"{source.place(row)}, column {column}"
        raise UserError(f"{place}: is not an image that can be read") from error


def native_side(split: Any, column: str, source: Source) -> int | None:
    """Return the side of the images if the first 64 are squares of the same size, else None."""
    sizes = {read_image(split, column, source, row).size for row in range(min(len(split), 64))}
    width, height = next(iter(sizes))
    return width if len(sizes) == 1 and width == height else None


def prepare_images(data: TaskData, bundle: ModelBundle, config: Any) -> PreparedData:
    """Prepare the images of all splits.

    Images no larger than the model's input are stored at their own size: for a 224x224 model, 32x32 images are cropped
    with a border of 4 pixels and then enlarged. Larger images are stored at input size / crop_fraction.

    Args:
        data: the rows.
        bundle: the model, with its input size and normalisation.
        config: has `augment` and `seed`.

    Raises:
        UserError: if neither the model nor the data determines the input size.
    """
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
    """Stack items to `pixel_values` (B, C, size, size) and `labels` (B,)."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
