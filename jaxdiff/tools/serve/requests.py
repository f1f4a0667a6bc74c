"""What a page asks for, as it comes over the wire, checked: each refusal is a sentence with a status code."""

import base64
import json
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from jaxdiff.generation.batch.groups import program_key, shared
from jaxdiff.generation.canvas import image_size
from jaxdiff.generation.conditioning import encoded
from jaxdiff.generation.drawing import make_drawing, settled
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.request import PICTURES, PROMPTS, Request, whole_number
from jaxdiff.io.images import read_image, read_mask
from jaxdiff.io.images.decode import header_size

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
    """Pixels of one image, drawn or given."""
    images: int = 16
    """Images of one request."""
    steps: int = 2000
    """Steps times images of one request."""
    waiting: int = 64
    """Images that wait to be drawn."""
    batch: int = 4
    """Images drawn at once: those of one request, or of several that differ in no setting."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole_number(f"--limits.{name}", value, 1)


@dataclass(frozen=True)
class DrawRequest:
    """A request for images, with what a page wants beside them."""

    request: Request
    key: Hashable
    """Requests of the same key can be drawn together."""
    preview: bool
    """Whether the page wants to see the guess after each step."""
    warnings: tuple[str, ...]
    """Sentences about the prompts."""


def read_request(body: bytes, pipe: Pipeline, limits: Limits) -> DrawRequest:
    """What a request's JSON asks for: fields of `Request`, with images as files in base64 (as they are, or as data
    URLs), and `preview`.

    Raises:
        ValueError: in a sentence, for what is out of range or of the wrong kind.
        Refused: for what is too large.
    """
    values = _json(body)
    preview = values.pop("preview", False)
    if not isinstance(preview, bool):
        raise ValueError(f"preview is {preview!r}; it must be true or false.")
    for name in PROMPTS:
        if isinstance(text := values.get(name), str) and len(text) > MAX_TEXT:
            raise Refused(413, f"{name} has {len(text)} characters; {MAX_TEXT} are the most.")
    files = {name: _file(name, values.pop(name, None)) for name in ("image", "mask")}
    for name, file in files.items():
        _check_pixels(f"The {name}", header_size(file or b""), limits)
    if files["image"] is not None:
        values["image"] = image = read_image(files["image"])
        if files["mask"] is not None:
            values["mask"] = read_mask(files["mask"], (image.shape[1], image.shape[0]))
    elif files["mask"] is not None:
        raise ValueError("mask requires an image.")
    for name in set(PICTURES) - files.keys():  # a path would name a file of this machine
        if values.get(name):
            raise ValueError(f"{name} is for Python and the shell; leave it out.")
    request = Request.of({"prompt": "", "seed": 0} | values)
    request.check_portable()
    if request.n > limits.images:
        raise ValueError(f"n is {request.n}; it must be from 1 to {limits.images} images.")
    request = settled(request, pipe.info)
    assert request.steps is not None
    if request.steps * request.n > limits.steps:
        raise Refused(
            413,
            f"{request.n} images of {request.steps} steps are {request.n * request.steps} steps, and one request may "
            f"ask for {limits.steps}; ask for fewer.",
        )
    _check_pixels("The image", image_size(request, pipe.networks, pipe.size), limits)
    drawing = make_drawing([replace(request, n=1)], pipe.info)  # refuses here what does not fit the model
    prompts, warnings = encoded([request], pipe.model.tokenizers, drawing.steps)
    layout = drawing.shape, prompts[0].ids.shape[1:4]
    return DrawRequest(request, (program_key(request, layout), shared(request), preview), preview, tuple(warnings))


def _json(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The request is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise ValueError('The request must be a JSON object, such as {"prompt": "a red apple"}.')
    return given


def _file(name: str, value: Any) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value.rpartition(",")[2], validate=True)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{name} must be an image file in base64.") from error


def _check_pixels(name: str, size: tuple[int, int], limits: Limits) -> None:
    if size[0] * size[1] > limits.pixels:
        raise Refused(413, f"{name} has {size[0]}x{size[1]} pixels; {limits.pixels} are the most.")
