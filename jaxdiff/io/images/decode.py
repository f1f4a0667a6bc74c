"""From a file's bytes to an image: decoding that trusts nothing."""

import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""What is decoded, whatever a file is called: some of Pillow's other readers run programs."""
SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
)
"""What files of `FORMATS` are called, in lower case."""
MAX_PIXELS = 64_000_000
"""Images of more pixels than this are refused before they are decoded: a small file can hold a huge image."""

_UNREAD = {
    "HEIC": re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    "AVIF": re.compile(rb"....ftypavi", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
}
"""How files begin that are images, and yet not read: of other formats, or of rare kinds of those that are."""
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""For the byte order in a raw mode of Pillow's, the one under which the lower byte passes for the higher."""
_DARKEST_WHITE = 4096
"""Whole numbers of unknown range whose largest lies between 255 and this are neither of 8 nor surely of 16 bits."""


def decode(data: bytes) -> Image.Image:
    """The image as 8-bit RGB, or RGBA where part of it is transparent, upright as its EXIF data says.

    Samples of 16 bits are rounded to 8. Those of 32 bits, whose files do not say what white is, are taken to lie in 0
    to 1, or to be whole numbers in 0 to 255 or 0 to 65535.

    Raises:
        ValueError: where the bytes are no image of a kind in `FORMATS`, only a part of one, of more than `MAX_PIXELS`,
            or of samples in no such range; the message is a reason, such as "it is not an image".

    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at here
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image = ImageOps.exif_transpose(_to_8_bits(image, data))  # decodes all; a truncated file raises here
                if not image.has_transparency_data:
                    return image.convert("RGB")
                image = image.convert("RGBA")
                return image if min(image.getchannel("A").tobytes()) < 255 else image.convert("RGB")
    except UnidentifiedImageError as error:
        if kind := next((kind for kind, start in _UNREAD.items() if start.match(data)), None):
            raise ValueError(f"it is {kind}, damaged or of a kind that is not read: save it as PNG or JPEG") from error
        raise ValueError("it is not an image") from error
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MAX_PIXELS} pixels") from None
    except _NotRead:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error
    raise ValueError(f"it is {width}x{height}, more than {MAX_PIXELS} pixels")


def on_white(image: Image.Image) -> Image.Image:
    """What `decode` gives as RGB; what is transparent becomes white."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def header_size(file: bytes | Path) -> tuple[int, int]:
    """Width and height of the image as `decode` gives it, from the head of its file; (0, 0) where it has none."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            turned = image.getexif().get(Tag.Orientation, 1) in (5, 6, 7, 8)
            # Of a TIFF, Pillow gives the size as it will be when the image is upright.
            return (image.height, image.width) if turned and image.format != "TIFF" else image.size
    except Exception:  # Pillow's plugins raise nearly anything on damaged files; `decode` will tell
        return 0, 0


class _NotRead(ValueError):
    """An image that Pillow would read, and read wrongly."""


def _to_8_bits(image: Any, data: bytes) -> Image.Image:
    """The image, in a mode of 8 bits a sample where Pillow itself would cut samples off, or clip them."""
    tiff = image.tag_v2 if image.format == "TIFF" else {}
    bits, key = max(tiff.get(Tag.BitsPerSample, (16,))), image.info.get("transparency")
    raw = _raw_mode(image)
    if raw in ("L;2", "L;4") and isinstance(key, int):  # Pillow scales the samples to 8 bits, and not this
        image.info["transparency"] = key * (85 if raw == "L;2" else 17)
    if (values := _deep_samples(image, raw, tiff, data)) is None:
        return image

    image.load()  # a TIFF is turned when it is loaded, and loses its mark of that
    white = _white(values) if image.mode in ("I", "F") else 2**bits - 1
    samples = np.rint(values.astype(np.float32) * np.float32(255) / np.float32(white)).astype(np.uint8)
    if tiff.get(Tag.PhotometricInterpretation) == 0:  # 0 is white, and Pillow minds that in 8 bits alone
        samples = 255 - samples
    if key is not None:
        hidden = (values.reshape(*values.shape[:2], -1) == np.atleast_1d(key)).all(-1)
        samples = np.dstack([samples, np.where(hidden, 0, 255).astype(np.uint8)])
    height, width, *channels = samples.shape
    mode = "CMYK" if image.mode == "CMYK" else {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels[0] if channels else 1]
    out = Image.frombytes(mode, (width, height), samples.tobytes())
    out.getexif()[Tag.Orientation] = image.getexif().get(Tag.Orientation, 1)
    return out


def _deep_samples(image: Any, raw: str, tiff: Any, data: bytes) -> Shaped[np.ndarray, "h w *c"] | None:
    """Samples of more than 8 bits, as the file has them; None where Pillow's own 8 bits are right."""
    bits = max(tiff.get(Tag.BitsPerSample, (16,)))
    if bits < 32 and max(tiff.get(Tag.SampleFormat, (1,))) == 2:
        raise _NotRead(f"its samples are signed numbers of {bits} bits: save it with unsigned ones")
    if bits > 8 and tiff.get(Tag.PlanarConfiguration) == 2 and tiff.get(Tag.SamplesPerPixel, 1) > 1:
        raise _NotRead(f"it is a TIFF of {bits} bits whose channels lie apart: save it with interleaved ones")
    if re.search(r"B[FS]$", raw) and image.tile[0].codec_name == "libtiff":  # which brings bytes into order itself
        return _unpack(data, image.mode, f"{raw[:-2]}N{raw[-1]}")
    if raw == "LA;16B":
        pairs = _unpack(data, "RGBA", "RGBA").astype(np.uint16)  # the two bytes of each sample as two channels
        return pairs[..., ::2] << 8 | pairs[..., 1::2]
    if re.fullmatch(r"(RGB|RGBA|RGBX|CMYK);16[BLN]", raw):
        high, low = (_unpack(data, image.mode, raw[:-1] + order) for order in (raw[-1], _OTHER_BYTE[raw[-1]]))
        return high.astype(np.uint16) << 8 | low
    return np.asarray(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else None


def _raw_mode(image: Any) -> str:
    """How Pillow unpacks the samples, such as "RGB;16B"; "" where a decoder of the format's own does."""
    args = image.tile[0].args if image.tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _unpack(data: bytes, mode: str, raw: str) -> Shaped[np.ndarray, "h w *c"]:
    """The samples, each taken out of the file's bytes as a raw mode of Pillow's has it."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        image: Any = opened
        image._mode = mode
        image.tile = [
            tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:])) for tile in image.tile
        ]
        return np.asarray(image)


def _white(values: Shaped[np.ndarray, "h w"]) -> int:
    """The value of white among samples whose file does not say: 1, 255 or 65535."""
    low, high = values.min(), values.max()
    if low >= 0:  # not so where one is not a number
        if values.dtype.kind == "f" and high <= 1:
            return 1
        if high <= 65535 and (values == np.floor(values)).all():
            if high <= 255:
                return 255
            if high >= _DARKEST_WHITE:
                return 65535
    raise _NotRead(f"its samples of 32 bits go from {low:g} to {high:g}, which is neither 0 to 1 nor whole numbers of "
                   "8 or 16 bits: save it with 8 or 16 bits a sample")  # fmt: skip
