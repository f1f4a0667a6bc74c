"""What one row of a prompt file, or one request, may ask for."""

import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.arguments import floats
from jaxdiff.config import nearest
from jaxdiff.config.base import coerce
from jaxdiff.sampling.samplers import check_sampler
from jaxdiff.settings import Settings, settings

SEEDS = 2**32
"""Seeds lie below this."""
MAX_N = 100_000
"""So many pictures a row may ask for, so that a slip in one does not stop the others."""
TEXTS = ("prompt", "negative_prompt", "source_prompt", "to_prompt")
FOR_IMAGES = ("mask", "outpaint", "upscale")
"""What there must be an image for; of the settings: strength, invert and enlarge."""


class Region(NamedTuple):
    """A prompt for a part of the picture."""

    prompt: str
    box: tuple[float, float, float, float]
    """Left, top, right and bottom, in shares of the sides."""


@dataclass(frozen=True)
class Row:
    """What is in a picture, or in `n` pictures with successive seeds, and how they are drawn.

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
    image: str | None = None
    """A picture to start from: its path."""
    mask: str | None = None
    """The path of a picture of the image's size, whose white is drawn anew in the image."""
    source_prompt: str = ""
    """For `invert`, what is in the image."""
    regions: tuple[Region, ...] = ()
    """Prompts for parts of the picture; the rest is the prompt's."""
    outpaint: tuple[int, ...] | None = None
    """So many pixels more around the image, left, top, right and bottom."""
    upscale: int | None = None
    """How many times as wide and high the image becomes."""
    to_prompt: str | None = None
    """A second prompt, towards which the picture goes."""
    to_seed: int | None = None
    """A second seed, towards whose noise it goes."""
    share: float = 0.5
    """How far it goes: 0 is the first picture, 1 the second."""
    settings: Settings = field(default_factory=Settings)
    """How it is drawn."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name, hint in hints.items():
            value: Any = _taken(hint, getattr(self, name), name)
            if name in TEXTS and value is not None:
                value = _utf8(value)
            object.__setattr__(self, name, value)
        for name, value in {"n": self.n, "steps": self.settings.steps}.items():
            _require(value >= 1, name, value, "at least 1")
        _require(self.n <= MAX_N, "n", self.n, f"{MAX_N} at most")
        _require(self.seed is None or 0 <= self.seed <= SEEDS - self.n, "seed", self.seed,
                 f"from 0 to {SEEDS - self.n}, for {self.n} pictures")  # fmt: skip
        _require(self.to_seed is None or 0 <= self.to_seed < SEEDS, "to_seed", self.to_seed, f"from 0 to {SEEDS - 1}")
        _require(0 <= self.share <= 1, "share", self.share, "from 0 to 1")
        _require(self.upscale is None or self.upscale >= 1, "upscale", self.upscale, "at least 1")
        if (around := self.outpaint) is not None:
            right = len(around) == 4 and min(around) >= 0
            _require(right, "outpaint", around, "four numbers of pixels, 0 or more: left, top, right and bottom")

    @property
    def grows(self) -> bool:
        """Whether the picture is the image made larger, by its pixels or by its latent."""
        return self.upscale is not None or self.settings.enlarge > 1

    def check(self) -> None:
        """Whether all of it goes together, as far as can be said without the model.

        Raises:
            ValueError: in a sentence, where not.
        """
        ask = self.settings
        if ask.invert is None:
            check_sampler(ask.sampler, ask.grid, ask.eta, ask.cache_interval)
            if ask.keep or self.source_prompt:
                raise ValueError("keep and source_prompt are for an image whose noise is found; say how, by invert.")
        if self.image is None:
            given = {**{name: getattr(self, name) for name in FOR_IMAGES}, "strength": ask.strength,
                     "invert": ask.invert, "enlarge": ask.enlarge if ask.enlarge > 1 else None}  # fmt: skip
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} is {value!r}, and there is no image that it is for.")
        if self.outpaint is not None and self.mask is not None:
            raise ValueError("outpaint makes its own mask; leave out mask.")
        if (self.outpaint is not None) + (self.upscale is not None) + (ask.enlarge > 1) > 1:
            raise ValueError("outpaint, upscale and enlarge are steps of their own; leave the others for another time.")
        if ask.size is not None and (self.outpaint is not None or self.grows):
            raise ValueError("The image and outpaint, upscale or enlarge say the size; leave out size.")
        if self.to_prompt is not None and self.regions:
            raise ValueError("A second prompt is for prompts without regions; leave these, or to_prompt, out.")

    @classmethod
    def of(cls, values: Mapping[str, Any], defaults: "Row | None" = None) -> "Row":
        """A row of values by name, as JSON, a form or a CSV file has them: text stands for numbers and sizes, too.

        Args:
            values: any fields of `Row` and of `Settings`. None counts as not given; so does empty text, but for the
                prompt, the negative and the source prompt.
            defaults: where what is not given comes from, but for the prompt.

        Raises:
            ValueError: as the class, `check` and `jaxdiff.settings.settings`, and for an unknown name, which is told
                the nearest right one; or no prompt.
        """
        given: dict[str, Any] = {}
        for name, value in values.items():
            if name not in HINTS:
                raise ValueError(f"There is no argument {name!r}{nearest(name, list(HINTS))}")
            if value is not None and (value != "" or name in ("prompt", "negative_prompt", "source_prompt")):
                value = _from_text(HINTS[name], value) if isinstance(value, str) else value
                given[name] = value if name in SETTINGS else _taken(HINTS[name], value, name)
        if "prompt" not in given:
            raise ValueError("There is no prompt.")
        base = Row("") if defaults is None else defaults
        how = {name: given.pop(name) for name in tuple(given) if name in SETTINGS}
        checked = settings(how)
        how = {name: getattr(checked, name) for name in how}
        row = replace(base, **given, settings=replace(base.settings, **how))
        row.check()
        return row

    def values(self) -> dict[str, Any]:
        """Everything that it asks for, by name, as JSON holds it; `of` reads it back."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "settings"}
        own["regions"] = [region._asdict() for region in self.regions]
        return json.loads(json.dumps(own | asdict(self.settings)))


SETTINGS = tuple(one.name for one in fields(Settings))
HINTS: dict[str, Any] = typing.get_type_hints(Row) | typing.get_type_hints(Settings)
"""The types of all that a row may give."""
del HINTS["settings"]


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; it must be {what}.")


def _utf8(text: str) -> str:
    """The text without what UTF-8 cannot hold, which JSON and shells can pass."""
    return text.encode("utf-8", "replace").decode()


def _taken(hint: Any, value: Any, name: str) -> Any:
    """The value as the field wants it."""
    return regions_of(value) if name == "regions" else coerce(hint, value, name)


def regions_of(given: Any) -> tuple[Region, ...]:
    """Regions from what JSON has for them.

    Raises:
        ValueError: in a sentence, where it is something else, or a box does not lie in the picture.
    """
    if not isinstance(given, list | tuple):
        raise ValueError(f'regions is {given!r}; it must be a list of {{"prompt": ..., "box": [l, t, r, b]}}.')
    return tuple(_region(i, one) for i, one in enumerate(given))


def _region(i: int, given: Any) -> Region:
    given = given._asdict() if isinstance(given, Region) else given
    if not isinstance(given, dict) or set(given) != {"prompt", "box"} or not isinstance(given["prompt"], str):
        raise ValueError(f'regions[{i}] is {given!r}; it must be {{"prompt": ..., "box": [l, t, r, b]}}.')
    box = floats(given["box"])
    if box.shape != (4,) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(f"regions[{i}].box is {given['box']!r}; it must be left, top, right and bottom in shares of "
                         "the sides, from 0 to 1.")  # fmt: skip
    left, top, right, bottom = np.asarray(given["box"], float).tolist()
    return Region(_utf8(given["prompt"]), (left, top, right, bottom))


def _from_text(hint: Any, text: str) -> Any:
    """The value that `hint` wants; the text itself where it is none, for the checks to tell."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not tuple else (hint,)
    kinds = kinds or (hint,)
    if str in kinds:
        return text
    try:
        if bool in kinds:
            return {"true": True, "false": False}.get(text.strip().lower(), text)
        if lists := [kind for kind in kinds if typing.get_origin(kind) is tuple]:
            read: Callable[[str], Any] = typing.get_args(lists[0])[0]
            if read is Region:
                return json.loads(text)
            return tuple(read(part) for part in re.split(r"\s*[x,;\s]\s*", text.strip().lower()))
        return int(text) if int in kinds else float(text)
    except (ValueError, RecursionError):
        return text
