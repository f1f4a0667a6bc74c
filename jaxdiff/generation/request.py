"""What can be wanted of an image: one list for Python, the command line, prompt files, the page and images' metadata.

Each field has its check beside it. What is wrong in itself is refused where a `Request` is made, what does not go
together by `check`, and what does not fit a model where the request meets the model (`jaxdiff.generation.drawing`).
"""

import json
import math
import operator
import re
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32

from jaxdiff.config import nearest
from jaxdiff.sampling.samplers import SAMPLERS, check_sampler
from jaxdiff.sampling.sigmas import SCHEDULES

SEEDS = 2**32
"""Seeds of the generator "jax" lie below this."""
TORCH_SEEDS = 2**64
"""Those of the generator "torch"."""
MAX_N = 100_000
"""Images that one request may ask for, so that a slip in one row of a file does not stop the others."""
MAX_SIDE = 8192
"""Pixels along a side; far beyond, XLA's own counters overflow and abort the process."""

MAX_TOLD = 100_000
"""Pixels along a side that a network may be told of."""

# A file's path, or an array.
Pixels: TypeAlias = str | Path | np.ndarray


class Region(NamedTuple):
    """A prompt for a part of the image."""

    prompt: str
    box: Any
    """Left, top, right and bottom in shares of the sides; or numbers [height, width] from 0 to 1."""


def shown(value: Any) -> str:
    """A value as a message shows it: of an array its type and shape, and what is long is cut."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    try:
        text = repr(value)
    except ValueError:  # Python writes out no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-20:]}"


# Checks: (field's name, value) -> the value as the field holds it, or a ValueError with name, value and rule ----------


def whole_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """A whole number of any integer type, from `low` to `high`."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool | np.bool_) or not low <= found <= high:
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number{_range(low, high)}.")
    return found


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`, not rounded to float32, since it is written into images."""
    array = floats(value)
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"
    if boolean or array.shape or not np.isfinite(array) or not low <= float(value) <= high:
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number{_range(low, high)}.")
    return float(value)


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return "" if low == -math.inf else f", {low:g} or more"
    return f" from {low} to {high}" if isinstance(high, int) else f" from {low:.10g} to {high:.10g}"


def floats(value: Any) -> Float32[np.ndarray, "..."]:
    """Real numbers of any type as float32: NaN for what is none, infinity for what float32 does not hold."""
    array = _array(value)
    if not np.can_cast(array.dtype, np.float64):
        return np.array(np.nan, np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def text(name: str, value: Any) -> str:
    """Text, without what UTF-8 cannot hold, which JSON and shells can pass."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be text.")
    return value.encode("utf-8", "replace").decode()


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {shown(value)}; it must be true or false.")
    return bool(value)


def one_of(name: str, value: Any, *, names: Iterable[str]) -> str:
    """One of these names."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} is {shown(value)}, which is unknown{nearest(str(value), list(names))}")
    return value


def size_of(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> tuple[int, int]:
    """(width, height) in pixels from two whole numbers, or from text such as 64x48."""
    sides = re.split(r"\s*[x,;\s]\s*", value.strip().lower()) if isinstance(value, str) else value
    if isinstance(value, str) and (len(sides) != 2 or not all(side.isdecimal() for side in sides)):
        raise ValueError(f"{name} is {shown(value)}; write it as WIDTHxHEIGHT, such as 64x64.")
    found = [int(side) for side in sides] if isinstance(value, str) else value
    found = _array(found).tolist() if hasattr(found, "__array__") else found
    if not isinstance(found, Iterable) or isinstance(found, bytes) or len(found := list(found)) != 2:
        raise ValueError(f"{name} is {shown(value)}; it must be (width, height), in pixels.")
    width, height = (whole_number(name, side, low, high) for side in found)
    return width, height


def corner(name: str, value: Any) -> tuple[int, int]:
    """Two whole numbers of pixels, 0 or more."""
    found = _array(value).tolist() if hasattr(value, "__array__") else value
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise ValueError(f"{name} is {shown(value)}; it must be two whole numbers of pixels: left and top.")
    left, top = (whole_number(name, side, 0, MAX_SIDE) for side in found)
    return left, top


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two noise levels, the lower one first."""
    found = floats(value)
    if found.shape != (2,) or any(isinstance(end, bool) for end in value) or not 0 <= found[0] <= found[1]:
        raise ValueError(
            f"{name} is {shown(value)}; it must be two noise levels (sigma), 0 or more, the lower one first."
        )
    low, high = value
    return float(low), float(high)


def margins(name: str, value: Any) -> tuple[int, int, int, int]:
    """Pixels to add at the left, top, right and bottom."""
    rule = f"{name} is {shown(value)}; it must be four whole numbers of pixels, 0 or more: left, top, right and bottom."
    try:
        left, top, right, bottom = (whole_number(name, side, 0) for side in tuple(value))
        if isinstance(value, bytes):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(rule) from None
    return left, top, right, bottom


def pixels(name: str, value: Any) -> Pixels:
    """A file's path; or uint8 [height, width, 3]."""
    if isinstance(value, str | Path):
        return _path(name, value)
    array = _array(value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise ValueError(f"{name} must be a file, or uint8 [height, width, 3]; it is {array.dtype} "
                         f"{list(array.shape)}.")  # fmt: skip
    return array


def images_of(name: str, value: Any) -> tuple[Pixels, ...]:
    """An image, or a tuple of them."""
    single = not isinstance(value, list | tuple) or getattr(value, "ndim", 0)
    return tuple(pixels(name, one) for one in ([value] if single else value))


def numbers(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
    """A number, or a tuple of them."""
    single = not isinstance(value, list | tuple)
    return tuple(number(name, one, low, high) for one in ([value] if single else value))


def mask_of(name: str, value: Any) -> Pixels:
    """A file's path; or numbers [height, width] from 0 (kept) to 1 (drawn anew), bool, or uint8 to 255 or to 1."""
    if isinstance(value, str | Path):
        return _path(name, value)
    array = _array(value)
    scale = 255 if array.dtype.kind in "iu" and array.size and array.max() > 1 else 1  # 0 and 1 are bits
    array = floats(array.astype(np.float32) if array.dtype == bool else array) / np.float32(scale)
    if array.ndim != 2 or not array.size or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name} must be a file, or numbers [height, width] from 0 (kept) to 1 (drawn anew), or uint8 "
                         "up to 255.")  # fmt: skip
    return array


def depth_of(name: str, value: Any) -> Pixels:
    """A file's path; or finite numbers [height, width]."""
    if isinstance(value, str | Path):
        return _path(name, value)
    array = floats(value)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a file, or finite numbers [height, width]; it has the shape "
                         f"{list(array.shape)}.")  # fmt: skip
    return array


def _path(name: str, value: str | Path) -> str:
    path = str(value)
    if not path or path != text(name, path):
        raise ValueError(f"{name} is {shown(path)}; it must be the path of a file, in UTF-8.")
    return path


def _array(value: Any) -> np.ndarray:
    """The array that a value is, or stands for; of rows of different lengths, one of objects."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.array(value, object)


def unit_noise(name: str, value: Any) -> Float32[np.ndarray, "h w c"]:
    """Finite numbers [height, width, channels] in latent pixels."""
    array = floats(value)
    if array.ndim != 3 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers [height, width, channels]; it has the shape "
                         f"{list(array.shape)}.")  # fmt: skip
    return array


def regions_of(name: str, value: Any) -> tuple[Region, ...]:
    """Regions from (prompt, box or mask) pairs, or from what JSON has for them."""
    if not isinstance(value, list | tuple):
        raise ValueError(f'{name} is {shown(value)}; it must be a list of {{"prompt": ..., "box": [l, t, r, b]}}.')
    return tuple(_region(f"{name}[{i}]", one) for i, one in enumerate(value))


def _region(name: str, given: Any) -> Region:
    if isinstance(given, dict) and set(given) == {"prompt", "box"}:
        given = given["prompt"], given["box"]
    if not isinstance(given, tuple | list) or len(given) != 2 or not isinstance(given[0], str):
        raise ValueError(
            f'{name} is {shown(given)}; it must be {{"prompt": ..., "box": [l, t, r, b]}}, or a prompt and where it is.'
        )
    prompt, where = given
    array = floats(where)
    if array.shape == (4,):
        if not (0 <= array[0] < array[2] <= 1 and 0 <= array[1] < array[3] <= 1):
            raise ValueError(
                f"{name}.box is {shown(where)}; it must be left, top, right and bottom in shares of the sides, from 0 "
                "to 1."
            )
        return Region(text(name, prompt), tuple(np.asarray(where, float).tolist()))
    if array.ndim != 2:
        raise ValueError(f"{name}.box must be four shares of the sides, or a mask [height, width] of the image's size; "
                         f"it has the shape {list(array.shape)}.")  # fmt: skip
    mask: Any = mask_of(f"{name}.box", _array(where))
    if not mask.any():
        raise ValueError(f"{name}.box selects nothing: all of it is 0; leave the region out.")
    return Region(text(name, prompt), mask)


share = partial(number, low=0.0, high=1.0)
shares = partial(numbers, low=0.0, high=1.0)
count = partial(whole_number, low=1)
times = partial(whole_number, low=1, high=16)
seed_number = partial(whole_number, low=0)


@dataclass(frozen=True)
class Field:
    """What is said of a field beside its type."""

    check: Callable[[str, Any], Any]
    """(name, value) -> the value as the request holds it, or a ValueError with name, value and rule."""
    per_image: bool = False
    """Whether images that are drawn together may differ in it."""
    needs: tuple[str, ...] = ()
    """Fields of which one must be given with it."""


# The request ----------------------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {"steps": 30, "guidance": 7.5, "sampler": "ddim", "schedule": "model"}
"""What stands in for a setting that neither the user nor the model gives."""


@dataclass(frozen=True)
class Request:
    """What is in an image, or in `n` images with successive seeds, and how they are drawn.

    Raises:
        ValueError: in a sentence with the field's name, its value and the rule.
    """

    prompt: Annotated[str, Field(text, per_image=True)] = ""
    """What to draw."""
    negative_prompt: Annotated[str, Field(text, per_image=True)] = ""
    """What to steer away from."""
    seed: Annotated[int | None, Field(seed_number, per_image=True)] = None
    """The first image's seed; image k has seed + k. None goes on from the images before, the first of which has 0."""
    n: Annotated[int, Field(partial(whole_number, low=1, high=MAX_N), per_image=True)] = 1
    """Images of the prompt."""
    image: Annotated[Pixels | None, Field(pixels, per_image=True)] = None
    """An image to start from: a file, which is made to fit the model or the size, or uint8 [h, w, 3] as it is."""
    mask: Annotated[Pixels | None, Field(mask_of, per_image=True, needs=("image",))] = None
    """An image of the image's size; what is white (1) is drawn anew, what is black (0) is kept exactly."""
    source_prompt: Annotated[str, Field(text, per_image=True, needs=("invert",))] = ""
    """With invert, what is in the image."""
    regions: Annotated[tuple[Region, ...], Field(regions_of)] = ()
    """Prompts for parts of the image; the rest is the prompt's (Bar-Tal et al. 2023)."""
    outpaint: Annotated[tuple[int, int, int, int] | None, Field(margins, needs=("image",))] = None
    """Pixels to add around the image: left, top, right and bottom."""
    upscale: Annotated[int | None, Field(times, needs=("image",))] = None
    """How many times as wide and high the image becomes; its detail is drawn anew."""
    latent_upscale: Annotated[int, Field(times, needs=("image",))] = 1
    """The same by stretching the latent: more is drawn anew, best at a strength of 0.5 and more."""
    to_prompt: Annotated[str | None, Field(text, per_image=True)] = None
    """A second prompt, with which the first is mixed."""
    to_seed: Annotated[int | None, Field(seed_number, per_image=True)] = None
    """A second seed, with whose noise the first's is mixed."""
    mix: Annotated[float, Field(share, per_image=True, needs=("to_prompt", "to_seed"))] = 0.5
    """How far to go towards to_prompt and to_seed: 0 is the first image, 1 the second."""
    depth: Annotated[Pixels | None, Field(depth_of, per_image=True)] = None
    """For models that draw by a depth map: a file, bright where it is near, or numbers [h, w] of any range."""
    image_guidance: Annotated[float | None, Field(partial(number, low=1.0), needs=("image",))] = None
    """For models that edit images by instruction, how closely to follow the image (Brooks et al. 2023); 1 is not at
    all. None is 1.5."""
    control_image: Annotated[tuple[Pixels, ...], Field(images_of, per_image=True)] = ()
    """An image that the result follows, by a control network; of several networks, a tuple with one for each."""
    control_scale: Annotated[tuple[float, ...], Field(numbers, needs=("control_image",))] = (1.0,)
    """How strongly it is followed: 0 is not at all, 1 as it was trained; one for all networks, or one each."""
    control_start: Annotated[tuple[float, ...], Field(shares, needs=("control_image",))] = (0.0,)
    """The share of the steps before which it is not followed."""
    control_end: Annotated[tuple[float, ...], Field(shares, needs=("control_image",))] = (1.0,)
    """The share of the steps after which it is not followed any more."""
    control_guess: Annotated[bool, Field(flag, needs=("control_image",))] = False
    """Follow it where the prompt says little or nothing: the networks see the prompt's half of guidance alone."""
    image_prompt: Annotated[tuple[Pixels, ...], Field(images_of, per_image=True)] = ()
    """An image that stands beside the prompt, by an IP-Adapter: one or several for one adapter; of several adapters, a
    tuple with one for each. For models that read an image themselves (variations, unCLIP), that image."""
    image_prompt_scale: Annotated[tuple[float, ...], Field(numbers, needs=("image_prompt",))] = (1.0,)
    """How much it counts beside the prompt: 0 is not at all; one for all IP-Adapters, or one each."""
    noise_level: Annotated[int | None, Field(partial(whole_number, low=0))] = None
    """For models that read an image with noise, how much of it, as a training step: more leaves the model more to
    find. None is 0 for unCLIP's, 20 for those that enlarge an image."""
    latents: Annotated[np.ndarray | None, Field(unit_noise, per_image=True)] = None
    """Unit normal noise [h, w, c] in place of the seed's."""
    steps: Annotated[int | None, Field(count)] = None
    """Denoising steps. None is the model's own, or 30."""
    guidance: Annotated[float | None, Field(number)] = None
    """Classifier-free guidance scale (Ho & Salimans 2022); 1 and less is the prompt's prediction itself. None is the
    model's own, or 7.5."""
    sampler: Annotated[str | None, Field(partial(one_of, names=SAMPLERS))] = None
    """How steps are taken: ddim, euler, dpmpp_2m, unipc and others; a wrong name lists them all. None is the model's
    own, or ddim."""
    schedule: Annotated[str | None, Field(partial(one_of, names=SCHEDULES))] = None
    """The noise levels (sigmas) of the steps: model (the one the model's config asks for), trailing, karras,
    exponential, beta, sgm_uniform or align_your_steps. None is the model's own."""
    eta: Annotated[float, Field(share)] = 0.0
    """For ddim, the share of fresh noise in each step, 0 to 1 (Song et al. 2021, eq. 16); for tcd, its gamma."""
    size: Annotated[str | tuple[int, int] | None, Field(size_of)] = None
    """Width and height in pixels, as 64x64. None is the image's, or the model's own."""
    strength: Annotated[float | None, Field(share, needs=("image",))] = None
    """How much of the noise schedule an image goes through, 0 to 1 (Meng et al. 2022, SDEdit): 0 leaves it, 1 starts
    from the highest level. None is 0.8; 1 with invert or a mask; 0.35 with upscale."""
    feather: Annotated[float, Field(partial(number, low=0.0), needs=("mask", "outpaint"))] = 0.0
    """Pixels inside the mask's edge over which the drawn part fades into the image."""
    invert: Annotated[
        Literal["ddim", "exact"] | None, Field(partial(one_of, names=("ddim", "exact")), needs=("image",))
    ] = None
    """How to find an image's noise and draw from it: ddim, or exact (EDICT, in twice the time)."""
    keep_layout: Annotated[float, Field(share, needs=("invert",))] = 0.0
    """With invert, the share of the steps, from the first, whose layout stays the image's (Tumanyan et al. 2023)."""
    tile: Annotated[int | None, Field(count)] = None
    """Side in pixels of the overlapping tiles in which the model sees an image larger than itself (Bar-Tal et al.
    2023)."""
    rng: Annotated[Literal["jax", "torch"], Field(partial(one_of, names=("jax", "torch")))] = "jax"
    """The random number generator: jax, or torch for the numbers of PyTorch's on a CPU."""
    guidance_rescale: Annotated[float, Field(share)] = 0.0
    """How much of the contrast that guidance adds is taken back, 0 to 1 (Lin et al. 2024)."""
    guidance_interval: Annotated[tuple[float, float] | None, Field(interval)] = None
    """The lowest and the highest noise level (sigma) with guidance; elsewhere steps take half the time (Kynkäänniemi et
    al. 2024). None is all."""
    apg_eta: Annotated[float, Field(share)] = 1.0
    """The share of guidance along the prediction that is left, which oversaturates: 0 is none (Sadat et al. 2024)."""
    apg_norm_threshold: Annotated[float | None, Field(partial(number, low=0.0))] = None
    """The largest norm of guidance's direction (Sadat et al. 2024, r). None is no limit."""
    apg_momentum: Annotated[float | None, Field(partial(number, low=-0.99, high=0.99))] = None
    """How much of guidance's direction of the steps before is added to it; below 0, as -0.5, it pushes away from it
    (Sadat et al. 2024, beta). None is none."""
    pag_scale: Annotated[float | None, Field(partial(number, low=0.0))] = None
    """Perturbed-attention guidance scale (Ahn et al. 2024); 3 is usual, and takes half as long again."""
    cache_interval: Annotated[int, Field(count)] = 1
    """3 computes most of the network at every third step: faster, and another image (Ma et al. 2023, DeepCache)."""
    clip_skip: Annotated[int, Field(partial(whole_number, low=0))] = 0
    """Layers of the text encoder, from the last, that are left out; 1 takes the penultimate layer's features."""
    original_size: Annotated[str | tuple[int, int] | None, Field(partial(size_of, low=1, high=MAX_TOLD))] = None
    """For Stable Diffusion XL, the width and height of the photo that the image shall look made from: a small one was
    enlarged, and is blurred (Podell et al. 2023). None is the image's own size."""
    crop: Annotated[tuple[int, int] | None, Field(corner)] = None
    """For Stable Diffusion XL, pixels that shall seem cut off at the left and at the top. None is 0 and 0."""
    aesthetic_score: Annotated[float | None, Field(partial(number, low=0.0, high=100.0))] = None
    """For the refiner of Stable Diffusion XL, how well people are to like the image, about 0 to 10. None is 6."""
    refiner_start: Annotated[float | None, Field(share)] = None
    """With a refiner, the share of the noise schedule that the model itself goes through, before the refiner takes
    over. None is 0.8 (Podell et al. 2023, section 2.5)."""
    literal: Annotated[bool, Field(flag)] = False
    """Take brackets and the like in prompts as text."""

    def __post_init__(self) -> None:
        for name, (field, kind) in _fields().items():
            value = getattr(self, name)
            if value is not None or type(None) not in typing.get_args(kind):
                object.__setattr__(self, name, field.check(name, value))
        for name, n in (("seed", self.n), ("to_seed", 1)):
            seed, most = getattr(self, name), self.last_seed - n + 1
            if seed is not None and seed > most:
                images = f" and {n} images" if n > 1 else ""
                raise ValueError(f"{name} is {seed}; with rng {self.rng!r}{images} it must be from 0 to {most}.")

    @classmethod
    def of(cls, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> "Request":
        """A request from values by name, as JSON, a form or a CSV file has them; text stands for numbers, too.

        Args:
            values: any fields. None counts as not given; so does empty text, but for prompts.
            defaults: where fields come from that `values` does not give.

        Raises:
            ValueError: as the class and `check`; for an unknown name, with the nearest right one; without a prompt.
        """
        given: dict[str, Any] = {}
        for name, value in by_current_names(values).items():
            if value is not None and (name in PROMPTS or not (isinstance(value, str) and value == "")):
                given[name] = _from_text(_fields()[name][1], value) if isinstance(value, str) else value
        if "prompt" not in given:
            raise ValueError("There is no prompt.")
        request = cls(**{**(defaults or {}), **given})
        request.check()
        return request

    def check(self) -> None:
        """Whether the fields go together, as far as that depends on no model.

        Raises:
            ValueError: in a sentence, where not.
        """
        given = self.given()
        for name, value in given.items():
            needs = _fields()[name][0].needs
            if needs and not given.keys() & set(needs):
                raise ValueError(f"{name} is {shown(value)}, and requires {' or '.join(needs)}.")
        if self.invert is not None and (self.mask is not None or self.latents is not None):
            raise ValueError("invert finds the noise of the whole image; leave out mask and latents.")
        if self.invert is None and self.sampler is not None:
            check_sampler(self.sampler, self.schedule or "model", self.eta, self.cache_interval)
        if self.outpaint is not None and self.mask is not None:
            raise ValueError("outpaint makes its own mask; leave out mask.")
        if self.outpaint is not None and not any(self.outpaint):
            raise ValueError("outpaint adds nothing to the image; give a side some pixels.")
        larger = (self.outpaint is not None) + (self.upscale is not None) + (self.latent_upscale > 1)
        if larger > 1:
            raise ValueError("Give only one of outpaint, upscale and latent_upscale.")
        if self.latent_upscale > 1 and (self.mask is not None or self.invert is not None):
            raise ValueError("latent_upscale draws all of the image anew; leave out mask and invert.")
        if self.size is not None and larger:
            raise ValueError("The image and outpaint, upscale or latent_upscale give the size; leave out size.")
        if self.to_prompt is not None and self.regions:
            raise ValueError("to_prompt is for prompts without regions; leave out one of them.")
        for name in CONTROL_NUMBERS:
            if (n := len(getattr(self, name))) not in (1, len(self.control_image)):
                raise ValueError(
                    f"There are {n} of {name} for {len(self.control_image)} control images; give one, or one each."
                )
        for start, end in zip(*self.of_controls(len(self.control_image))[1:], strict=True):
            if start >= end:
                raise ValueError(f"control_start is {start:g} and control_end {end:g}; it must start before it ends.")
        if self.control_image and self.cache_interval > 1:
            raise ValueError(
                "cache_interval leaves out what control networks add; leave out cache_interval or control_image."
            )
        if self.tile is not None and self.cache_interval > 1:
            raise ValueError("cache_interval keeps the features of one tile only; leave out tile or cache_interval.")
        if self.rng == "torch" and self.sampler == "dpmpp_sde":
            raise ValueError("rng 'torch' is not for dpmpp_sde, whose noise PyTorch draws by another rule.")

    def given(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""

        def differs(value: Any, default: Any) -> bool:
            return value is not default and (isinstance(value, np.ndarray) or value != default)

        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {name: value for name, (value, default) in values.items() if differs(value, default)}

    @property
    def last_seed(self) -> int:
        """The largest seed that the request's generator takes."""
        return (TORCH_SEEDS if self.rng == "torch" else SEEDS) - 1

    @property
    def enlarges(self) -> bool:
        """Whether the result is the image made larger, by its pixels or by its latent."""
        return self.upscale is not None or self.latent_upscale > 1

    def of_controls(self, n: int) -> list[tuple[float, ...]]:
        """The scale, start and end of each of `n` control networks."""
        found = [getattr(self, name) for name in CONTROL_NUMBERS]
        return [values * n if len(values) == 1 else values for values in found]

    def without_adapters(self, size: tuple[int, int]) -> "Request":
        """The request without images for control networks, from the first of which the result may have its size, and
        for IP-Adapters."""
        if not self.control_image and not self.image_prompt:
            return self
        names = ("control_image", *CONTROL_NUMBERS, "control_guess", "image_prompt", "image_prompt_scale")
        rest = {one.name: one.default for one in fields(self) if one.name in names}
        return replace(self, **rest, **({"size": size} if self.image is None and self.control_image else {}))

    def windows(self, n: int) -> list[tuple[float, float] | None]:
        """The shares of the steps at which each of `n` control networks starts and ends; None is all of them."""
        _, starts, ends = self.of_controls(n)
        return [None if pair == (0, 1) else pair for pair in zip(starts, ends, strict=True)]

    def pictures(self) -> Iterator[tuple[str, Pixels]]:
        """The files and arrays that it has, by their fields' names; of several, `control_image_2` and so on."""
        for name in PICTURES:
            given = getattr(self, name)
            for i, one in enumerate(given if isinstance(given, tuple) else [] if given is None else [given]):
                yield (f"{name}_{i + 1}" if i else name), one

    def check_portable(self) -> None:
        """Whether a file or a page may ask for it: arrays are for Python, since metadata cannot hold them.

        Raises:
            ValueError: for noise, or a region that is no box.
        """
        if self.latents is not None:
            raise ValueError("latents are for Python only; leave them out.")
        for i, region in enumerate(self.regions):
            if isinstance(region.box, np.ndarray):
                raise ValueError(f"regions[{i}].box must be left, top, right and bottom; masks are for Python only.")

    def images(self, seed: int) -> "list[Request]":
        """One request for each of the `n` images, the first with the request's own seed, or else `seed`."""
        first = seed if self.seed is None else self.seed
        return [replace(self, n=1, seed=first + k) for k in range(self.n)]

    def values(self) -> dict[str, Any]:
        """All fields by name as JSON holds them; `of` reads them back. Arrays are left out."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        own |= {name: [image for image in own[name] if not isinstance(image, np.ndarray)] for name in SEVERAL}
        own["regions"] = [{"prompt": prompt, "box": box} for prompt, box in self.regions if isinstance(box, tuple)]
        return json.loads(json.dumps({name: value for name, value in own.items() if not isinstance(value, np.ndarray)}))


SEVERAL = ("control_image", "image_prompt")
PICTURES = ("image", "mask", "depth", *SEVERAL)
"""Fields that are files or arrays, of one image or `SEVERAL`."""
CONTROL_NUMBERS = ("control_scale", "control_start", "control_end")
PROMPTS = ("prompt", "negative_prompt", "source_prompt", "to_prompt")
"""Texts that may be empty."""
RENAMED = {
    "grid": "schedule", "share": "mix", "enlarge": "latent_upscale", "keep": "keep_layout", "window": "tile",
    "noise": "rng", "rescale": "guidance_rescale", "parallel": "apg_eta", "limit": "apg_norm_threshold",
    "perturbed": "pag_scale", "to_prompts": "to_prompt", "negative": "negative_prompt",
}  # fmt: skip
"""Old names, which are taken for one version more."""


ELSEWHERE = {
    "guidance_scale": "guidance", "num_inference_steps": "steps", "generator": "seed", "height": "size=(width, height)",
    "width": "size=(width, height)", "num_images_per_prompt": "n", "mask_image": "mask", "scheduler": "sampler",
    "controlnet_conditioning_scale": "control_scale", "control_guidance_start": "control_start",
    "control_guidance_end": "control_end", "guess_mode": "control_guess", "adapter_conditioning_scale": "control_scale",
    "adapter_conditioning_factor": "control_end", "controlnet": "control_image, and the network an argument of load",
    "ip_adapter_image": "image_prompt", "ip_adapter_scale": "image_prompt_scale", "cfg_scale": "guidance",
    "denoising_strength": "strength", "batch_size": "n",
}  # fmt: skip
"""Names of diffusers and others."""


def current_name(name: str) -> str:
    """The field's name, for one that has been renamed; with a warning."""
    if (new := RENAMED.get(name)) is None:
        return name
    warnings.warn(f"{name} is now called {new}; the old name goes with the next version.", FutureWarning, stacklevel=2)
    return new


def by_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values by the fields that their names stand for, as `current_name`.

    Raises:
        ValueError: for a name that is no field's, with the nearest right one, or two names of one field.
    """
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = current_name(given)
        if (here := ELSEWHERE.get(name)) is not None:
            raise ValueError(f"There is no argument {name!r}; here it is {here}.")
        if name not in _fields():
            raise ValueError(f"There is no argument {name!r}{nearest(name, list(_fields()))}")
        if name in found:
            raise ValueError(f"{name} is given twice, once by its old name.")
        found[name] = value
    return found


@cache
def _fields() -> dict[str, tuple[Field, Any]]:
    """What is said of each field, and its type."""
    hints = typing.get_type_hints(Request, include_extras=True)
    return {name: (hint.__metadata__[0], hint.__origin__) for name, hint in hints.items()}


PER_IMAGE = tuple(name for name, (field, _) in _fields().items() if field.per_image)
"""Fields in which images that are drawn together may differ; all others they share."""


def _from_text(hint: Any, given: str) -> Any:
    """The value that text stands for; the text itself where it stands for none, which the check then names."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not tuple else (hint,)
    kinds = [kind for kind in kinds or (hint,) if kind is not type(None)]
    if str in kinds or typing.get_origin(kinds[0]) is Literal:
        return given
    try:
        if bool in kinds:
            return {"true": True, "false": False}.get(given.strip().lower(), given)
        if typing.get_origin(kinds[0]) is tuple:
            kind: Any = typing.get_args(kinds[0])[0]
            if kind is Region:
                return json.loads(given)
            if str in typing.get_args(kind):
                return json.loads(given) if given.startswith("[") else given
            return tuple(kind(part) for part in re.split(r"\s*[x,;\s]\s*", given.strip().lower()))
        return int(given) if int in kinds else float(given)
    except (ValueError, RecursionError):
        return given
