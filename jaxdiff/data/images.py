"""From a file's bytes to a square picture: decoding that trusts nothing, a background, crop and flip."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jaxdiff.config import DataConfig
from jaxdiff.data.captions import COLOURS, Caption
from jaxdiff.data.record import BadRecord, Record

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, whatever a file is called: some of Pillow's other readers run programs."""
MAX_PIXELS = 64_000_000
"""Pictures of more pixels than this are refused before they are decoded: a small file can hold a huge picture."""


def decode(data: bytes) -> Image.Image:
    """The picture as 8-bit RGB, or RGBA where part of it is transparent, upright as its EXIF data says.

    Raises:
        BadRecord: where the bytes are no picture of a kind in `FORMATS`, only a part of one, or of more than
            `MAX_PIXELS`.

    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadRecord(f"it is {width}x{height}, more than {MAX_PIXELS} pixels")
            image = ImageOps.exif_transpose(image)  # decodes all of it; a truncated file raises here
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
                return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
            if not image.has_transparency_data:
                return image.convert("RGB")
            image = image.convert("RGBA")
            return image if min(image.getchannel("A").tobytes()) < 255 else image.convert("RGB")
    except BadRecord:
        raise
    except UnidentifiedImageError as error:
        raise BadRecord("it is no picture") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise BadRecord(f"{type(error).__name__}: {error}") from error


def header_size(file: bytes | Path) -> tuple[int, int]:
    """Width and height of the picture as `decode` gives it, from the head of its file; (0, 0) where it has none."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception:  # Pillow's plugins raise nearly anything on damaged files; `decode` will tell
        return 0, 0


def on_background(image: Image.Image, colour: str) -> Image.Image:
    """A transparent picture on one of `COLOURS`. Art that is pure black is drawn white on black."""
    drawing = image.convert("RGB")
    if colour == "black" and drawing.getextrema() == ((0, 0),) * 3:
        drawing = ImageOps.invert(drawing)
    ground = Image.new("RGB", image.size, COLOURS[colour])
    ground.paste(drawing, mask=image.getchannel("A"))
    return ground


def augment(
    image: Image.Image, rng: np.random.Generator, *, shape: tuple[int, int], crop: float, flip: bool
) -> Image.Image:
    """A random part of the aspect of `shape` (height, width), mirrored half of the time if `flip`, in that many pixels.

    Its sides are at least `crop` times those of the largest such part; a crop of 1 takes that, in the middle.
    """
    share, x, y, mirrored = rng.random(4)
    height, width = shape
    scale = 1 if crop == 1 else crop + (1 - crop) * share
    across = min(image.width, image.height * (width / height)) * scale
    down = min(image.height, image.width * (height / width)) * scale
    x, y = (0.5, 0.5) if crop == 1 else (x, y)
    left, top = (image.width - across) * x, (image.height - down) * y
    if (across, down, image.size) != (width, height, (width, height)):
        box = (left, top, min(left + across, image.width), min(top + down, image.height))
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(image) if flip and mirrored < 0.5 else image


def prepare(
    record: Record, rng: np.random.Generator, config: DataConfig, shape: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "h w 3"], Caption]:
    """The record's picture in `shape` (height, width), augmented by `rng`, and its caption with the ground's colour.

    Raises:
        BadRecord: where the picture cannot be decoded.

    """
    image, caption = decode(record.image), record.caption
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    if image.mode == "RGBA":
        image, caption = on_background(image, colour), dataclasses.replace(caption, colour=colour)
    image = augment(image, rng, shape=shape, crop=config.crop, flip=config.flip)
    return np.asarray(image), caption


def to_float(images: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b h w 3"]:
    """uint8 pictures as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1
