"""Several images in one: contact sheets and film strips."""

import re
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

SHEET, STEPS = "contact-sheet", "-steps"
"""What a contact sheet is called, and what follows an image's name in that of the film strip of its steps."""
_SHEETS = re.compile(rf"((^|/){SHEET}|{STEPS})(-\d+)?\.\w+$")


def is_sheet(name: str) -> bool:
    """Whether a file is called as a contact sheet or a film strip is, and shows several images."""
    return _SHEETS.search(name) is not None


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    captions: Sequence[str] = (),
    columns: int | None = None,
    cell: int = 160,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Images of one size in rows on white, each over its caption.

    Args:
        images: at least one.
        captions: as many, or none; long ones are wrapped, and cut after three lines.
        columns: images in a row; None makes the sheet about square.
        cell: images narrower than this are enlarged by a whole factor, so that captions fit and pixels stay square.

    Raises:
        ValueError: when there is no image, sizes differ, or there are fewer or more captions than images.
    """
    if not len(images):
        raise ValueError("A contact sheet needs at least one image.")
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"A contact sheet's images must have one size, not {sorted({i.shape[:2] for i in images})}.")
    if captions and len(captions) != len(images):
        raise ValueError(f"There are {len(images)} images but {len(captions)} captions.")
    h, w = images[0].shape[:2]
    zoom = max(1, cell // w)
    h, w = h * zoom, w * zoom
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)

    font_size = max(10, w // 14)
    font = ImageFont.load_default(font_size)
    gap, line = max(4, w // 32), font_size + 3
    letters = max(4, int(w / font.getlength("abcdefghij nopqrs tu") * 20))
    wrapped = [textwrap.wrap(c, letters, max_lines=3, placeholder="...") for c in captions]
    text_height = line * max(map(len, wrapped), default=0)

    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + text_height + gap)
        sheet.paste(Image.fromarray(np.asarray(image)).resize((w, h), Image.Resampling.NEAREST), (x, y))
        for j, words in enumerate(wrapped[i] if wrapped else ()):
            draw.text((x, y + h + j * line), words, "black", font)
    return np.asarray(sheet)


def film_strip(
    frames: Sequence[UInt8[np.ndarray, "h w 3"]], captions: Sequence[str] = (), most: int = 16
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Frames of one size side by side, each over its caption: the first, the last, and others evenly between them.

    Args:
        frames: at least one.
        captions: as many, or none.
        most: how many frames are shown.

    Raises:
        ValueError: as `contact_sheet`, and where `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"most is {most}; a film strip shows at least 1 frame.")
    if captions and len(captions) != len(frames):
        raise ValueError(f"There are {len(frames)} frames but {len(captions)} captions.")
    shown: list[int] = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int).tolist()
    return contact_sheet([frames[i] for i in shown], [captions[i] for i in shown if captions], len(shown) or 1)
