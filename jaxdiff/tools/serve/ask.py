"""What a page asks for, as it comes over the wire and checked: each refusal is a sentence with a status code."""

import base64
import json
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdiff.arguments import seeds, whole
from jaxdiff.decode import header_size
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.io.images import read_mask, read_picture
from jaxdiff.pipeline import Pipeline
from jaxdiff.prompts import Words, encode
from jaxdiff.sampling.samplers import count_steps, make_sigmas
from jaxdiff.settings import Settings, settings

MAX_TEXT = 10_000
"""Characters of a prompt."""


class Refused(Exception):
    """A request that is not met, with the status code that says whose fault it is."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How much may be asked for: what is more is refused in a sentence."""

    body: int = 32_000_000
    """Bytes of one request."""
    pixels: int = 1024 * 1024
    """Of one picture, drawn or given."""
    pictures: int = 16
    """Of one request."""
    steps: int = 2000
    """Steps times pictures of one request."""
    waiting: int = 64
    """Pictures that wait to be drawn."""
    batch: int = 4
    """Pictures drawn at once: those of one request, or of several that differ in no setting."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--limits.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class Ask:
    """One request: pictures that differ in their seeds alone."""

    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    settings: Settings
    image: np.ndarray | None
    """uint8 [h, w, 3]"""
    mask: np.ndarray | None
    """float32 [h, w], from 0 (kept) to 1 (drawn)."""
    preview: bool
    """Whether the page wants to see the guess after each step."""
    warnings: tuple[str, ...]
    """Sentences about the prompts."""

    @property
    def key(self) -> Hashable:
        """Requests of the same one can be drawn together."""
        return self.settings, None if self.image is None else self.image.shape, self.mask is None, self.preview


def read_ask(body: bytes, pipe: Pipeline, limits: Limits) -> Ask:
    """What a request's JSON asks for: `prompt`, `negative_prompt`, `seed`, `n`, `image` and `mask` (files in base64, as
    they are or as data URLs), `preview`, and any of `jaxdiff.settings.Settings`.

    Raises:
        ValueError: in a sentence, for what is out of range or of the wrong kind.
        Refused: for what is too large.
    """
    given = _json(body)
    prompt, negative = (_text(name, given.pop(name, "")) for name in ("prompt", "negative_prompt"))
    seed, n, preview = given.pop("seed", 0), whole("n", given.pop("n", 1)), given.pop("preview", False)
    files = [_file(name, given.pop(name, None)) for name in ("image", "mask")]
    if not isinstance(preview, bool):
        raise ValueError(f"preview is {preview!r}; it must be true or false.")
    if not 1 <= n <= limits.pictures:
        raise ValueError(f"n is {n}; it must lie from 1 to {limits.pictures} pictures.")
    ask = settings(given)
    if ask.steps * n > limits.steps:
        raise Refused(413, f"{n} pictures of {ask.steps} steps are {n * ask.steps} steps, and one request may ask for "
                           f"{limits.steps}; ask for less of them.")  # fmt: skip
    width, height = ask.size if isinstance(ask.size, tuple) else pipe.size or (0, 0)
    _small_enough("The picture", (width, height), limits)
    image, mask = files
    for name, file, times in (("The image", image, 1), ("The mask", mask, 1), ("The picture", image, ask.enlarge)):
        across, down = header_size(file or b"")
        _small_enough(name, (across * times, down * times), limits)
    if image is None and (mask is not None or ask.strength is not None or ask.invert is not None):
        raise ValueError("mask, strength and invert are for an image; give one.")
    picture = None if image is None else read_picture(image)

    levels = make_sigmas(
        ask.sampler, ask.grid, pipe.model.scheduler, make_schedule(pipe.model.scheduler), ask.steps, ask.eta
    )
    _, warnings = encode([Words(prompt, negative)], pipe.tokenizer, count_steps(levels), literal=ask.literal)
    return Ask(
        prompt=prompt,
        negative_prompt=negative,
        seeds=tuple(map(int, seeds("seed", seed, n))),
        settings=ask,
        image=picture,
        mask=None if mask is None or picture is None else read_mask(mask, (picture.shape[1], picture.shape[0])),
        preview=preview,
        warnings=tuple(warnings),
    )


def _json(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The request is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise ValueError("The request must be a JSON object, such as {\"prompt\": \"a red apple\"}.")  # fmt: skip
    return given


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be text.")
    if len(value) > MAX_TEXT:
        raise Refused(413, f"{name} has {len(value)} characters; {MAX_TEXT} are the most.")
    return value.encode("utf-8", "replace").decode()  # half of a surrogate pair is no character


def _file(name: str, value: Any) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value.rpartition(",")[2], validate=True)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{name} must be a picture's file in base64.") from error


def _small_enough(name: str, size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.pixels:
        raise Refused(413, f"{name} has {size[0]}x{size[1]} pixels; {limits.pixels} are the most.")
