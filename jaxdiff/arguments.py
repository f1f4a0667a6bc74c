"""What a caller gives, checked: each function returns plain values, or says in a sentence what is wrong."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

MAX_SIDE = 8192  # pixels; far beyond, XLA's own counters overflow and abort the process


def whole(name: str, value: Any) -> int:
    """A whole number, of any integer type."""
    message = f"{name} is {value!r}; it must be a whole number."
    if isinstance(value, bool):
        raise ValueError(message)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(message) from None


def floats(value: Any) -> Float32[np.ndarray, "..."]:
    """Real numbers of any type as float32; NaN for whatever else it is, infinity for what float32 does not hold."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return np.array(np.nan, np.float32)
    if not np.can_cast(array.dtype, np.float64):
        return np.array(np.nan, np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def number(name: str, value: Any, low: float = -np.inf, high: float = np.inf) -> Float32[np.ndarray, ""]:
    """One finite number from `low` to `high`."""
    given = floats(value)
    if given.shape or not np.isfinite(given) or not low <= given <= high:
        if np.isinf(low) and np.isinf(high):
            raise ValueError(f"{name} is {value!r}; it must be a finite number.")
        bound = f"{low:g} or more" if np.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value!r}; it must {'be' if np.isinf(high) else 'lie'} {bound}.")
    return given


def texts(given: Any) -> list[str]:
    """Prompts: one, or several."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    found: list[Any] = list(given) if several else [given]
    for text in found:
        if not isinstance(text, str):
            raise ValueError(f"A prompt is {text!r}; it must be text.")
    return found


def one_each(name: str, given: Any, b: int) -> list[str]:
    """One text for all of b images, or one each; None is ""."""
    found = [given or ""] * b if isinstance(given, str | None) else texts(given)
    if len(found) != b:
        raise ValueError(f"There are {len(found)} {name} for {b} prompts; give one, or one each.")
    return found


def seeds(name: str, given: Any, b: int) -> np.ndarray:
    """One for each of b images: `given + i`, or those that are given. uint32 [b]."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes)
    if several:
        found = [whole(name, seed) for seed in given]
        if len(found) != b:
            raise ValueError(f"There are {len(found)} seeds for {b} images; give the first, or one each.")
        for seed in found:
            if not 0 <= seed < 2**32:
                raise ValueError(f"{name} is {seed}; it must lie from 0 to {2**32 - 1}.")
    else:
        first = whole(name, given)
        if not 0 <= first <= 2**32 - b:
            raise ValueError(f"{name} is {first}; it must lie from 0 to {2**32 - b} for {b} images.")
        found = range(first, first + b)
    return np.array(found, np.uint32)


def pair(name: str, given: Any) -> tuple[int, int]:
    """Width and height in pixels."""
    found: Sequence[Any] = list(given) if isinstance(given, Iterable) else []
    if isinstance(given, str) or len(found) != 2:
        raise ValueError(f"{name} is {given!r}; it must be (width, height), in pixels.")
    width, height = (whole(name, side) for side in found)
    return width, height


def fits(name: str, size: tuple[int, int], factor: int, whose: str = "the VAE's factor") -> None:
    """Whether both sides are above 0, multiples of `factor`, and not beyond measure."""
    width, height = size
    if min(size) < factor or width % factor or height % factor:
        raise ValueError(f"{name} is {width}x{height}; both sides must be multiples of {factor}, {whose}.")
    if max(size) > MAX_SIDE:
        raise ValueError(f"{name} is {width}x{height}; a side may have {MAX_SIDE} pixels at most.")


def pictures(name: str, given: Any, b: int) -> UInt8[np.ndarray, "b h w 3"]:
    """One picture for all of b images, or one each."""
    found = np.asarray(given) if not isinstance(given, np.ndarray) else given
    if found.dtype != np.uint8 or found.ndim not in (3, 4) or found.shape[-1] != 3 or not found.size:
        raise ValueError(f"{name} must be uint8 [height, width, 3], or one such picture for each prompt; it is "
                         f"{found.dtype} {list(found.shape)}.")  # fmt: skip
    return _for_each(name, found, 3, b)


def masks(given: Any, b: int, size: tuple[int, int]) -> Float32[np.ndarray, "b h w"]:
    """One mask for all of b images or one each, in 0 ... 1, of `size` (width, height); from bool, uint8 or floats."""
    found = np.asarray(given)
    if found.dtype == bool:
        found = found.astype(np.float32)
    elif found.dtype == np.uint8:
        found = found.astype(np.float32) / 255
    found = floats(found)
    if found.ndim not in (2, 3) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError("mask must be numbers from 0 (kept) to 1 (drawn), or uint8 up to 255: [height, width], or one "
                         "for each prompt.")  # fmt: skip
    if found.shape[:-3:-1] != size:
        raise ValueError(f"mask is {found.shape[-1]}x{found.shape[-2]}, and the picture {size[0]}x{size[1]}; they must "
                         "have the same size.")  # fmt: skip
    return _for_each("mask", found, 2, b)


def placed(given: Any) -> list[tuple[str, Any]]:
    """Regions: a prompt, and where it is."""
    pairs: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f"A region is {pair!r}; it must be a prompt and where: a box, or a mask.")
    return [(prompt, where) for prompt, where in pairs]


def _for_each(name: str, found: np.ndarray, ndim: int, b: int) -> np.ndarray:
    if found.ndim == ndim:
        return np.broadcast_to(found, (b, *found.shape))
    if len(found) != b:
        raise ValueError(f"{name} holds {len(found)} pictures for {b} prompts; give one, or one each.")
    return found
