"""What one row of a prompt file, or one request, may ask for."""

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxdiff.config import nearest
from jaxdiff.config.base import coerce

SEEDS = 2**32
"""Seeds lie below this."""


@dataclass(frozen=True)
class Row:
    """The arguments of a picture, or of `n` pictures with successive seeds.

    Raises:
        ValueError: in a sentence that begins with the field's name, for values of the wrong kind or out of range.
    """

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What to steer away from."""
    seed: int | None = None
    """The first picture's seed; without it, the running number of the picture in its file."""
    n: int = 1
    """How many pictures."""
    steps: int = 30
    """How many times the model is asked."""
    guidance: float = 7.5
    """How hard to follow the prompt."""
    guidance_interval: tuple[float, ...] | None = None
    """The lowest and highest noise level (sigma) that are guided; None guides all."""
    sampler: str = "ddim"
    """How the steps are taken."""
    grid: str = "model"
    """Which noise levels they visit."""
    eta: float = 0.0
    """The share of fresh noise at each step, 0 to 1."""
    cache_interval: int = 1
    """Deep features are computed at every so many steps."""
    size: tuple[int, ...] | None = None
    """Width and height in pixels; None is the image's, or else the model's own."""
    image: str | None = None
    """A picture to start from: its path."""
    strength: float = 0.75
    """How much of the image is drawn anew, above 0 to 1."""
    mask: str | None = None
    """The path of a picture whose white is drawn anew in the image."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value = _taken(hints[field.name], getattr(self, field.name), field.name)
            if field.name in ("prompt", "negative_prompt"):  # JSON and shells can pass what UTF-8 cannot hold
                value = value.encode("utf-8", "replace").decode()
            object.__setattr__(self, field.name, value)
        for name in ("n", "steps", "cache_interval"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.seed is None or 0 <= self.seed <= SEEDS - self.n, "seed", self.seed,
                 f"from 0 to {SEEDS - self.n}, for {self.n} pictures")  # fmt: skip
        _require(0 <= self.eta <= 1, "eta", self.eta, "from 0 to 1")
        _require(0 < self.strength <= 1, "strength", self.strength, "above 0, to 1")
        if (interval := self.guidance_interval) is not None:
            right = len(interval) == 2 and 0 <= interval[0] <= interval[1]
            _require(right, "guidance_interval", interval, "two noise levels (sigma), 0 or more, the lower one first")
        if self.size is not None:
            _require(len(self.size) == 2 and min(self.size) > 0, "size", self.size, "width and height, such as 512x512")
        if self.mask is not None and self.image is None:
            raise ValueError(f"mask is {self.mask!r}, and there is no image that it is for.")

    @classmethod
    def of(cls, values: Mapping[str, Any], defaults: "Row | None" = None) -> "Row":
        """A row of values by name, as JSON, a form or a CSV file has them: text stands for numbers and sizes, too.

        Args:
            values: None counts as not given; so does empty text, but for the two prompts.
            defaults: where what is not given comes from, but for the prompt.

        Raises:
            ValueError: as the class, and for an unknown name, which is told the nearest right one; or no prompt.
        """
        hints = typing.get_type_hints(cls)
        given = {}
        for name, value in values.items():
            if name not in hints:
                raise ValueError(f"There is no argument {name!r}{nearest(name, list(hints))}")
            if value is not None and (value != "" or name in ("prompt", "negative_prompt")):
                value = _from_text(hints[name], value) if isinstance(value, str) else value
                given[name] = _taken(hints[name], value, name)
        if "prompt" not in given:
            raise ValueError("There is no prompt.")
        return cls(**given) if defaults is None else replace(defaults, **given)


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {what}.")


def _taken(hint: Any, value: Any, name: str) -> Any:
    """The value as the field wants it, whole numbers as floats in lists of those, too."""
    value = coerce(hint, value, name)
    return tuple(map(float, value)) if hint == tuple[float, ...] | None and value is not None else value


def _from_text(hint: Any, text: str) -> Any:
    """The value that `hint` wants; the text itself where it is none, for `coerce` to tell."""
    kinds = typing.get_args(hint) or (hint,)
    if str in kinds:
        return text
    try:
        if lists := [kind for kind in kinds if typing.get_origin(kind) is tuple]:
            number = typing.get_args(lists[0])[0]
            return tuple(number(part) for part in re.split(r"\s*[x,;\s]\s*", text.strip().lower()))
        return int(text) if int in kinds else float(text)
    except ValueError:
        return text
