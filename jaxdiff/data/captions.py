"""Captions: from what a file holds to texts, and the drawings' grammar.

Those of drawings are "{label}, {style} style, on a {colour} background", with parts dropped at random.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdiff.data.bad import BadRecord

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "red": (220, 30, 30),
    "orange": (255, 130, 0),
    "yellow": (255, 230, 0),
    "green": (40, 160, 60),
    "blue": (30, 80, 220),
    "purple": (130, 40, 180),
    "pink": (255, 150, 200),
    "cyan": (0, 200, 220),
    "brown": (110, 65, 25),
}
"""The plain backgrounds that transparent images get, as 8-bit sRGB."""


@dataclass(frozen=True)
class Caption:
    """What is known of an image. A plain text is a label alone, and is never changed."""

    label: str
    style: str = ""
    keywords: tuple[str, ...] = ()
    colour: str = ""
    """The background's name, one of `COLOURS`; empty where the image has none of its own."""
    others: tuple[str, ...] = ()
    """More captions of the same image; a draw takes one of these and the label."""
    drawing: bool = False
    """Whether what is transparent gets one of `COLOURS`, which captions may name, in place of white."""

    @classmethod
    def of(cls, value: Any, style: bytes | str = "", keywords: Iterable[bytes | str] = ()) -> "Caption":
        """The caption that a file's bytes, a string, or a list of these hold.

        Raises:
            BadRecord: as `caption_text` does, for any of the list, or where the value is something else.

        """
        values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        label, *others = [caption_text(one) for one in values] or [caption_text(None)]
        style = caption_text(style) if style else ""
        return cls(label, style, tuple(map(caption_text, keywords)), others=tuple(others))

    @classmethod
    def unpack(cls, values: dict[str, Any]) -> "Caption":
        """The caption of which JSON holds the `vars`."""
        lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | lists)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every caption of the image, without the parts of drawings."""
        return (self.label, *self.others)

    def full(self) -> str:
        """Every part: "red apple, noto style, on a blue background"."""
        return _join(self.label, self.style and f"{self.style} style", self.colour and background(self.colour))

    def draw(self, rng: np.random.Generator) -> str:
        """A caption of some of the parts, so that short and partial prompts are understood too."""
        dice = rng.random(8)  # drawn at once: which parts there are changes no later draw
        label, style = self.texts[int(dice[7] * len(self.texts))], self.style and f"{self.style} style"
        colour = self.colour and background(self.colour)
        if style and dice[0] < 0.25:
            style = ""
        if colour and dice[1] < 0.25:
            colour = ""
        if not self.style:
            return _join(label, "", colour)
        if (style or colour) and dice[2] < 0.03:
            label = ""
        elif self.keywords and dice[3] < 0.12:
            keyword = self.keywords[int(dice[4] * len(self.keywords))]
            label = keyword if dice[3] < 0.06 else f"{label}, {keyword}"
        elif dice[5] < 0.4:
            label = with_article(label)
        if colour and not style and label and dice[6] < 0.5:
            return f"{label} {colour}"
        return _join(label, style, colour)


def caption_text(value: Any) -> str:
    """The one way from what a file holds, bytes or a string, to a caption: UTF-8, and all white space one space.

    Byte-order marks are dropped. Text of other encodings is refused rather than guessed, be it known by bytes that are
    no UTF-8, by control characters (of which UTF-16 is full) or by the mark that another program has put in their
    place.

    Raises:
        BadRecord: where there is no caption, or it is no such text.

    """
    value = "" if value is None else value
    if not isinstance(value, bytes | str):
        raise BadRecord("its caption is no text", type(value).__name__)
    try:
        # Strings, too: JSON and Python's file names can hold halves of characters.
        text = (value if isinstance(value, bytes) else value.encode()).decode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadRecord("its caption is not UTF-8", f"{error.reason} at {error.start}") from error
    if odd := _ODD.search(text):
        raise BadRecord("its caption is not plain UTF-8 text", f"it holds U+{ord(odd[0]):04X}")
    text = " ".join(text.replace("\ufeff", "").split())
    if text.startswith("version https://git-lfs."):
        raise BadRecord("its caption is a Git LFS pointer: fetch the files themselves")
    if all(unicodedata.category(char)[0] in "ZC" for char in text):  # spaces, and what cannot be seen
        raise BadRecord("it has no caption")
    return text


_ODD = re.compile(r"[\0-\x08\x0e-\x1f\x7f-\x9f\ufffd]")  # control characters, and what replaced others


def background(colour: str) -> str:
    """The phrase for a background: "on an orange background"."""
    return f"on {'an' if colour[0] in 'aeiou' else 'a'} {colour} background"


def with_article(label: str) -> str:
    """The label with "a" or "an" before it, where it is a common noun in the singular."""
    head = re.split(r":| with | in | on | of | and ", label)[0]
    if not label[0].islower() or re.search(r"[^suio]s$", head) or _UNCOUNTABLE.search(head):
        return label
    # The sound decides, not the letter: "a unicorn", "an hourglass".
    vowel = re.match(r"(?!uni|use|euro|ewe|one\b|once\b|ufo)[aeiou]|hour", label)
    return f"{'an' if vowel else 'a'} {label}"


_UNCOUNTABLE = re.compile(
    r"\b(people|men|women|children|money|broccoli|bacon|butter|garlic|rice|salt|hibiscus|dna|bowling|camping|cooking|"
    r"racing|keycap|o\u2019clock)\b|^no\b"
)


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
