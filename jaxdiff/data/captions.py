"""Captions of drawings: "{label}, {style} style, on a {colour} background", with parts dropped at random."""

import re
from dataclasses import dataclass

import numpy as np

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

    def full(self) -> str:
        """Every part: "red apple, noto style, on a blue background"."""
        return _join(self.label, self.style and f"{self.style} style", self.colour and background(self.colour))

    def draw(self, rng: np.random.Generator) -> str:
        """A caption of some of the parts, so that short and partial prompts are understood too."""
        dice = rng.random(7)  # drawn at once: which parts there are changes no later draw
        label, style = self.label, self.style and f"{self.style} style"
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
