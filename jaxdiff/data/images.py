"""From a record's bytes to an image of the size asked for: a background, crop and flip."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import COLOURS, Caption
from jaxdiff.data.record import BadRecord, Record
from jaxdiff.io.images.decode import decode as decode_image
from jaxdiff.io.images.decode import on_white


def decode(data: bytes) -> Image.Image:
    """`jaxdiff.io.images.decode.decode`, of a record.

    Raises:
        BadRecord: where the bytes are no image that can be decoded.

    """
    try:
        return decode_image(data)
    except ValueError as error:
        raise BadRecord(str(error)) from error


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """A transparent image on one of `COLOURS`. Art that is pure black is drawn white on black."""
    drawing = image.convert("RGB")
    if colour == "black" and drawing.getextrema() == ((0, 0),) * 3:
        drawing = ImageOps.invert(drawing)
    ground = Image.new("RGB", image.size, COLOURS[colour])
    ground.paste(drawing, mask=image.getchannel("A"))
    return ground


class Augmentation(NamedTuple):
    """What is drawn for an image."""

    colour: int
    """The background's place in `COLOURS`."""
    share: float
    x: float
    y: float
    """Of a crop: how large between the smallest and the largest, and where, each in [0, 1)."""
    mirror: float
    """In [0, 1)."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Augmentation":
        """Draws the same number of times whatever is made of it."""
        return cls(int(rng.integers(len(COLOURS))), *rng.random(4).tolist())

    @property
    def background(self) -> str:
        """One of `COLOURS`."""
        return tuple(COLOURS)[self.colour]

    @property
    def mirrored(self) -> bool:
        """Half of the time."""
        return self.mirror < 0.5


class Cut(NamedTuple):
    """Of which image a crop is which part, in whole pixels: the order in which Stable Diffusion XL reads it.

    (Podell et al. 2023, section 2.2.) The corner is counted in the image as it would be seen whole: resized so that the
    crop has its size, and mirrored where the crop is.
    """

    original_height: int
    original_width: int
    """Of the image before it was resized."""
    top: int
    left: int
    """The crop's corner."""
    height: int
    width: int
    """Of the crop."""


def augment(
    image: Image.Image, drawn: Augmentation, *, shape: tuple[int, int], crop: float, flip: bool
) -> tuple[Image.Image, Cut]:
    """A random part of the aspect of `shape` (height, width), mirrored half of the time if `flip`, in that many pixels.

    Its sides are at least `crop` times those of the largest such part; a crop of 1 takes that, in the middle.
    """
    height, width = shape
    scale = 1 if crop == 1 else crop + (1 - crop) * drawn.share
    across = min(image.width, image.height * (width / height)) * scale
    down = min(image.height, image.width * (height / width)) * scale
    x, y = (0.5, 0.5) if crop == 1 else (drawn.x, drawn.y)
    left, top = (image.width - across) * x, (image.height - down) * y
    mirrored = flip and drawn.mirrored
    before = image.width - left - across if mirrored else left
    cut = Cut(image.height, image.width, round(top * height / down), round(before * width / across), height, width)
    if (across, down, image.size) != (width, height, (width, height)):
        box = (left, top, min(left + across, image.width), min(top + down, image.height))
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(image) if mirrored else image, cut


def has_ground(image: Image.Image, caption: Caption) -> bool:
    """Whether one of `COLOURS` shows through it."""
    return image.mode == "RGBA" and caption.drawing


def prepare(
    record: Record, rng: np.random.Generator, config: DataConfig, shape: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], Caption, Cut]:
    """The record's image in `shape` (height, width), augmented by `rng`, its caption, and what part it is of which.

    What is transparent becomes white; in drawings one of `COLOURS`, which the caption has then.

    Raises:
        BadRecord: where the image cannot be decoded.

    """
    image = decode(record.image)
    return prepared(image, record.caption, Augmentation.draw(rng), config, shape)


def prepared(
    image: Image.Image, caption: Caption, drawn: Augmentation, config: DataConfig, shape: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], Caption, Cut]:
    """`prepare` of a decoded image, with what was drawn for it."""
    if has_ground(image, caption):
        image = on_background(image, drawn.background)
        caption = dataclasses.replace(caption, colour=drawn.background)
    image, cut = augment(on_white(image), drawn, shape=shape, crop=config.crop, flip=config.flip)
    return np.asarray(image), caption, cut


def to_float(images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b h w 3"]:
    """uint8 images as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1
