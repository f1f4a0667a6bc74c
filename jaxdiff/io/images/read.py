"""Images, masks and settings from files that nobody vouches for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image

from jaxdiff.io.images.decode import decode, on_white
from jaxdiff.io.images.write import JSON_CHUNK, JSON_MARK

MAX_BYTES = 256_000_000
"""Files of more bytes than this are not read."""


def read_image(file: Path | str | bytes) -> UInt8[np.ndarray, "h w 3"]:
    """An image in PNG, JPEG, WebP, AVIF, BMP, GIF (its first frame) or TIFF; what is transparent becomes white.

    Args:
        file: its path, or its bytes.

    Raises:
        ValueError: where it cannot be read, is none of these, damaged, or too large.
    """
    return np.asarray(on_white(_read(file)))


def read_mask(file: Path | str | bytes, size: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """An image's grey as a mask: white, 1, is drawn anew, black, 0, is kept, and so is what is transparent.

    Where no value is above 1 of 255, 1 is white.

    Args:
        file: its path, or its bytes.
        size: (width, height) of the image that it is for, in pixels.

    Raises:
        ValueError: as `read_image`, and where the mask has another size.
    """
    image = _read(file)
    if image.size != tuple(size):
        name = "The mask" if isinstance(file, bytes) else f"The mask {file}"
        raise ValueError(f"{name} is {image.width}x{image.height}, the image {size[0]}x{size[1]}; "
                         "they must have one size.")  # fmt: skip
    mask = np.asarray(image.convert("L"), np.float32)
    mask = mask / 255 if mask.max(initial=0) > 1 else mask  # some write 1 for what is drawn
    return mask * (np.asarray(image.getchannel("A"), np.float32) / 255) if image.mode == "RGBA" else mask


def read_settings(path: Path | str) -> dict[str, Any] | None:
    """The settings that `write_image` put into a file; None for an image that carries none.

    Raises:
        ValueError: when the file is no PNG, JPEG or WebP, or its settings are damaged.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file.")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.format == "PNG":
                text = image.info.get(JSON_CHUNK)
            else:
                told = image.getexif().get(ExifTags.Base.ImageDescription)
                text = told.removeprefix(JSON_MARK) if isinstance(told, str) and told.startswith(JSON_MARK) else None
    except Exception as error:  # decoders meet damage with whatever comes to hand
        raise ValueError(f"{path} cannot be read as a PNG, JPEG or WebP: {error}.") from error
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} carries settings that are not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} carries settings that are no JSON object.")
    return settings


def read_bytes(path: Path | str) -> bytes:
    """A file of a size that an image can have.

    Raises:
        ValueError: where it cannot be read, is no file, or too large.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise ValueError(f"{path} is not a file.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}.")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _read(file: Path | str | bytes) -> Image.Image:
    """RGB, or RGBA where part of it is transparent."""
    data = file if isinstance(file, bytes) else read_bytes(file)
    try:
        return decode(data)
    except ValueError as error:
        name = "The image" if isinstance(file, bytes) else file
        raise ValueError(f"{name} cannot be read: {error}.") from error
