"""From a file's bytes to an image: decoding that trusts nothing."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is decoded, whatever a file is called: some of Pillow's other readers run programs."""
MAX_PIXELS = 64_000_000
"""Images of more pixels than this are refused before they are decoded: a small file can hold a huge image."""


def decode(data: bytes) -> Image.Image:
    """The image as 8-bit RGB, or RGBA where part of it is transparent, upright as its EXIF data says.

    Raises:
        ValueError: where the bytes are no image of a kind in `FORMATS`, only a part of one, or of more than
            `MAX_PIXELS`; the message is a reason, such as "it is not an image".

    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at here
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image = ImageOps.exif_transpose(image)  # decodes all of it; a truncated file raises here
                if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
                    return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
                if not image.has_transparency_data:
                    return image.convert("RGB")
                image = image.convert("RGBA")
                return image if min(image.getchannel("A").tobytes()) < 255 else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("it is not an image") from error
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error
    raise ValueError(f"it is {width}x{height}, more than {MAX_PIXELS} pixels")


def header_size(file: bytes | Path) -> tuple[int, int]:
    """Width and height of the image as `decode` gives it, from the head of its file; (0, 0) where it has none."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception:  # Pillow's plugins raise nearly anything on damaged files; `decode` will tell
        return 0, 0
