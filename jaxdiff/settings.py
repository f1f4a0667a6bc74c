"""What may be turned for a picture, beside what is in it: one list for the pipeline, `sample.py` and prompt files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from jaxdiff.arguments import floats, number, pair, whole
from jaxdiff.config import nearest
from jaxdiff.sampling.samplers import check_sampler


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn. `settings` makes one from what a user gives."""

    steps: int = 30
    """How many times the model is asked."""
    guidance: float = 7.5
    """How hard to follow the prompt (Ho & Salimans 2022); 1 is the model's own answer to it."""
    sampler: str = "ddim"
    """How the steps are taken: ddim, euler, dpmpp_2m, unipc and others; a wrong name lists them all."""
    grid: str = "model"
    """Which noise levels they visit: the model's own, trailing, karras, exponential, beta, sgm_uniform or
    align_your_steps."""
    eta: float = 0.0
    """For ddim, the share of fresh noise at each step, 0 to 1 (Song et al. 2021, eq. 16); for tcd, how far each step
    goes below its level and back (its gamma)."""
    size: str | tuple[int, int] | None = None
    """Width and height in pixels, as 64x64; None is the image's, or else the model's own."""
    strength: float | None = None
    """How much of the way from noise an image goes, 0 to 1 (Meng et al. 2022, SDEdit): 0 leaves it, 1 begins at the
    highest level. None is 0.8, or 1 with invert or a mask, which then draws from noise alone."""
    enlarge: int = 1
    """So many times as wide and high as the image, by stretching its latent: what is blurred by that is drawn anew,
    best at a strength of 0.5 and more."""
    feather: float = 0.0
    """So many pixels inside of the mask's edge, what is drawn fades over into the image."""
    invert: str | None = None
    """How to find the noise of an image and draw from it: "ddim", or "exact" (EDICT, in twice the time)."""
    keep: float = 0.0
    """With invert, the first share of the steps, 0 to 1, whose layout stays the image's (Tumanyan et al. 2023)."""
    window: int | None = None
    """The side in pixels of the overlapping windows through which the model looks at a picture larger than itself
    (Bar-Tal et al. 2023)."""
    noise: str = "jax"
    """What draws it from the seed: "jax", or "torch" for the numbers of PyTorch's generator on the CPU."""
    rescale: float = 0.0
    """How much of the contrast that guidance adds is taken back, 0 to 1 (Lin et al. 2024)."""
    parallel: float = 1.0
    """How much is left of the guidance along the picture itself, which makes colours glare: 0 is none, 1 all (Sadat et
    al. 2024, APG's eta)."""
    limit: float | None = None
    """The largest norm of the guidance's direction (the same, r); None is without."""
    perturbed: float | None = None
    """How hard to go away from what the model draws with blind attention (Ahn et al. 2024, PAG); 3 is usual. Takes half
    as long again."""
    guidance_interval: tuple[float, float] | None = None
    """The lowest and highest noise level (sigma) that are guided; None guides all. At the others the prompt alone is
    asked for, in half the time (Kynkäänniemi et al. 2024)."""
    cache_interval: int = 1
    """3 computes most of the network at every third step only: faster, and another picture (Ma et al. 2023, DeepCache);
    1 is exact."""
    literal: bool = False
    """Brackets and the like in prompts are themselves."""


def settings(given: Mapping[str, Any]) -> Settings:
    """Checked settings.

    Raises:
        ValueError: in a sentence, for a name that is none, or a value of another kind or out of range. What depends on
            the model is not known here.
    """
    names = [field.name for field in fields(Settings)]
    for name in given:
        if name not in names:
            raise ValueError(f"There is no setting {name!r}{nearest(name, names)}")
    return Settings(**{name: CHECKS[name](name, value) for name, value in given.items()})


def size_of(name: str, value: Any) -> tuple[int, int]:
    """(width, height) from two whole numbers, or from text as 64x48."""
    sides = [side.strip() for side in value.lower().split("x")] if isinstance(value, str) else value
    if isinstance(value, str) and (len(sides) != 2 or not all(side.isdecimal() for side in sides)):
        raise ValueError(f"{name} is {value!r}; write it as WIDTHxHEIGHT, such as 64x64.")
    return pair(name, [int(side) for side in sides] if isinstance(value, str) else sides)


def _number(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> float:
    number(name, value, low, high)
    return float(value)  # as it was given, not rounded to float32: it is written into pictures


def _at_least(low: int, name: str, value: Any) -> int:
    if (found := whole(name, value)) < low:
        raise ValueError(f"{name} is {found}; it must be at least {low}.")
    return found


def _interval(name: str, value: Any) -> tuple[float, float]:
    found = floats(value)
    if found.shape != (2,) or not 0 <= found[0] <= found[1]:
        raise ValueError(f"{name} is {value!r}; it must be two noise levels (sigma), 0 or more, the lower one first.")
    low, high = value
    return float(low), float(high)


def _one_of(allowed: tuple[str, ...], name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed))}.")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}; it must be true or false.")
    return bool(value)


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _sampler(name: str, value: Any) -> str:
    check_sampler(value)
    return value


def _grid(name: str, value: Any) -> str:
    check_sampler("ddim", value)  # which can use them all
    return value


_share = partial(_number, low=0.0, high=1.0)
# (name, value) -> the value as `Settings` holds it.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "steps": whole,
    "guidance": _number,
    "sampler": _sampler,
    "grid": _grid,
    "eta": _share,
    "size": _or_none(size_of),
    "strength": _or_none(_share),
    "enlarge": partial(_at_least, 1),
    "feather": partial(_number, low=0.0),
    "invert": _or_none(partial(_one_of, ("ddim", "exact"))),
    "keep": _share,
    "window": _or_none(partial(_at_least, 1)),
    "noise": partial(_one_of, ("jax", "torch")),
    "rescale": _share,
    "parallel": _share,
    "limit": _or_none(partial(_number, low=0.0)),
    "perturbed": _or_none(_number),
    "guidance_interval": _or_none(_interval),
    "cache_interval": partial(_at_least, 1),
    "literal": _flag,
}
