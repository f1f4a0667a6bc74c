"""Where requests meet a model: what a model's defaults fill in, what does not fit it, and the sizes that follow."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32, UInt8

from jaxdiff.config import SchedulerConfig, nearest
from jaxdiff.diffusion.denoiser import sigma_to_t
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.families import Family
from jaxdiff.generation.canvas import (
    Size,
    canvas_of,
    check_size,
    control_images,
    depth_map,
    image_size,
    latent_shape,
    pixels_of,
)
from jaxdiff.generation.programs import INVERSIONS
from jaxdiff.generation.request import DEFAULTS, PER_IMAGE, Request
from jaxdiff.runtime.memory import memory_bytes
from jaxdiff.sampling.samplers import SAMPLERS, count_steps, make_sigmas, starts_at_sigma
from jaxdiff.sampling.sigmas import Sigmas

REFINER_START = 0.8
"""How much of the noise schedule is drawn before a refiner takes over, where a request does not say."""
AESTHETIC_SCORE = 6.0
"""What the refiner of Stable Diffusion XL is told, where a request does not say: people liked the image."""
IMAGE_GUIDANCE = 1.5
"""How closely an edited image follows the one that it is made of, where a request does not say."""
SMALL_NOISE = 20
"""How much noise an image has that a model enlarges, as a training step, where a request does not say."""
MOST_SMALL_NOISE = 350
"""The most noise that such a model was trained at; diffusers' `max_noise_level`."""
UPSCALE_STRENGTH = 0.35
"""How much of an enlarged image is drawn anew, where the request does not say."""


@dataclass(frozen=True)
class ModelInfo:
    """What requests need to know of a model."""

    family: Family
    scheduler: SchedulerConfig
    size: Size | None
    """Width and height that the model was trained at, if it says."""
    dtype: DTypeLike
    defaults: Mapping[str, Any]
    """The settings that stand in for those that a request leaves out."""
    controls: tuple[Any, ...] = ()
    """The modules of the control networks that it was loaded with."""
    zero_empty: bool = False
    """Whether an empty negative prompt is zeros, and not what the text encoders make of it."""
    ip_adapters: int = 0
    """IP-Adapters that it was loaded with."""
    image_pixels: Callable[[UInt8[np.ndarray, "h w 3"]], Float32[np.ndarray, "s s 3"]] | None = None
    """Makes images what its image encoder reads."""
    noising: SchedulerConfig | None = None
    """The noise schedule of an image that the denoiser reads."""


@dataclass(frozen=True)
class Drawing:
    """Requests of one image each that are drawn together, and what follows from them and the model."""

    requests: Sequence[Request]
    """Each with a seed; settings are filled in, and the same in all."""
    shape: tuple[int, int, int]
    """Height, width and channels of a latent."""
    sigmas: Sigmas
    at_sigma: bool
    """Whether sampling starts from sigma * noise; see `jaxdiff.sampling.samplers.starts_at_sigma`."""
    steps: int
    """Steps that the sigmas are for; pndm takes one more than is asked for."""
    image: UInt8[np.ndarray, "b h w 3"] | None
    mask: Float32[np.ndarray, "b h w"] | None
    hints: tuple[UInt8[np.ndarray, "b h w 3"], ...] = ()
    """Control images, for each control network."""
    prompt_pixels: tuple[Float32[np.ndarray, "b n s s 3"], ...] = ()
    """Images beside the prompts, as the image encoder reads them, for each IP-Adapter, or for the model itself."""
    prompt_scales: tuple[float, ...] = ()
    """How much each IP-Adapter counts."""
    numbers: Float32[np.ndarray, "2 k"] | None = None
    """What the denoiser is told beside a negative prompt, and beside a prompt; None is nothing."""
    zero_empty: bool = False
    """Whether an empty negative prompt is zeros."""
    edits: bool = False
    """Whether the image is what the denoiser edits, and not what the noise is added to."""
    depth: Float32[np.ndarray, "b h2 w2"] | None = None
    """Depth maps in latent pixels, from -1 to 1."""
    small: UInt8[np.ndarray, "b h2 w2 3"] | None = None
    """Images that the denoiser enlarges, of the latent's height and width."""
    image_noise: tuple[int, ...] | None = None
    """The shape of the noise for an image that the denoiser reads."""
    noise_level: tuple[float, float] = (0.0, 1.0)
    """How much noise that image has: the training step, and the share of the image in the variance there."""
    embeds_guidance: bool = False
    """Whether the denoiser reads the guidance scale, and so needs no negative prompt."""

    @property
    def settings(self) -> Request:
        """The first request, for what all share."""
        return self.requests[0]

    @property
    def start(self) -> int:
        """The first step: an image stands for the result of those before."""
        strength = self.settings.strength
        if self.image is None or strength is None:
            return 0
        taken = int(self.steps * strength + 1e-4)
        return self.steps - (max(1, taken) if strength > 0 else 0)  # without a step the prompt would say nothing

    @property
    def layout_steps(self) -> int:
        """Steps whose layout is the source's."""
        return 0 if self.settings.invert is None else math.floor(self.settings.keep_layout * self.steps + 0.5)

    @property
    def control(self) -> list[tuple[float, tuple[float, float] | None]]:
        """For each control network how much it counts, and the noise levels above and up to which it does so.

        Of n steps, it counts at step i where i / n is not before its start and (i + 1) / n not beyond its end, as in
        diffusers; None is at all of them.
        """
        settings, n = self.settings, self.steps - self.start
        levels, ends = (
            np.asarray(part)[self.start : self.steps] for part in (self.sigmas.sigmas, self.sigmas.sigmas_next)
        )
        found = []
        scales, *_ = settings.of_controls(len(self.hints))
        for scale, window in zip(scales, settings.windows(len(self.hints)), strict=True):
            start, end = window or (0.0, 1.0)
            steps = [i for i in range(n) if start <= i / n and (i + 1) / n <= end]
            low = high = -math.inf
            if steps:
                high = math.inf if steps[0] == 0 else float(levels[steps[0]])
                low = -math.inf if steps[-1] == n - 1 else float(ends[steps[-1]])
            found.append((scale, None if window is None else (low, high)))
        return found

    @property
    def guidance(self) -> Guidance:
        """Its numbers, as the programs take them; those that are None keep the program smaller.

        A scale below 1 is 1, no guidance: diffusers has it so, and few-step models are published with "guidance 0".
        """
        settings = self.settings
        low, high = settings.guidance_interval or (None, None)
        scale = 1.0 if self.embeds_guidance else max(1.0, settings.guidance or 0.0)
        by_image = IMAGE_GUIDANCE if settings.image_guidance is None else settings.image_guidance
        numbers: dict[str, Any] = {
            "scale": scale,
            "image_guidance": by_image if self.edits and scale > 1 else None,
            "rescale": settings.guidance_rescale,
            "low": low,
            "high": high,
        }
        numbers |= {name: getattr(settings, name) for name in Guidance._fields if name not in numbers}
        return Guidance(**{name: np.float32(value) for name, value in numbers.items() if value is not None})


def refiner_step(drawing: Drawing, scheduler: SchedulerConfig) -> int:
    """The step at which a refiner takes over: the first whose training step is below its share of them."""
    given, schedule = drawing.settings.refiner_start, make_schedule(scheduler)
    first = round(scheduler.num_train_timesteps * (1 - (REFINER_START if given is None else given)))
    sigmas = np.asarray(drawing.sigmas.sigmas)[: drawing.steps]
    times = np.asarray(jax.vmap(lambda sigma: sigma_to_t(sigma, schedule))(jnp.asarray(sigmas)))
    return int((times >= first).sum())


def checked_defaults(given: Mapping[str, Any], scheduler: SchedulerConfig) -> dict[str, Any]:
    """A model's own settings over `DEFAULTS`.

    Raises:
        ValueError: for a setting that a request cannot leave to its model, or a value that is out of range or does not
            go with the model's noise schedule.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"A model's defaults are {given!r}; they must be settings by name.")
    for name, value in given.items():
        if name not in DEFAULTS or value is None:
            raise ValueError(f"A model's defaults have {name!r} = {value!r}{nearest(name, list(DEFAULTS))}")
    request = Request(**given)
    own = DEFAULTS | {name: getattr(request, name) for name in given}
    if given:
        make_sigmas(own["sampler"], own["schedule"], scheduler, make_schedule(scheduler), own["steps"])
    return own


def settled(request: Request, model: ModelInfo) -> Request:
    """The request with every setting filled in that it leaves to the model or to its task."""
    filled = {name: value for name, value in model.defaults.items() if getattr(request, name) is None}
    if request.invert is not None:
        filled["sampler"] = _drawn_back_by(request)
    sampler = filled.get("sampler", request.sampler)
    if "schedule" in filled and filled["schedule"] not in SAMPLERS[sampler].schedules:
        filled["schedule"] = DEFAULTS["schedule"]  # the model's own is not for a sampler that the request names
    if request.image is not None and request.strength is None:
        whole = request.mask is not None or request.outpaint is not None or request.invert is not None
        whole = whole or model.family.beside in ("image", "small image")
        filled["strength"] = UPSCALE_STRENGTH if request.enlarges else 1.0 if whole else 0.8
    own = model.size
    if request.enlarges and request.tile is None and request.cache_interval == 1 and own is not None:
        large = max(image_size(request, model.family, own)) > max(own)
        filled |= {"tile": max(own)} if large else {}
    return replace(request, **filled) if filled else request


def make_drawing(requests: Sequence[Request], model: ModelInfo) -> Drawing:
    """The drawing of requests of one image each.

    Raises:
        ValueError: in one sentence, where requests do not fit the model or each other.
    """
    requests = [settled(request, model) for request in requests]
    for request in requests:
        request.check()
    common, family = requests[0], model.family
    for name in ("image", "mask", "depth", "latents", "to_prompt", "to_seed"):
        if len({getattr(one, name) is None for one in requests}) > 1:
            raise ValueError(f"{name} is given for some of the requests; give it for all that are drawn together.")
    for name in vars(common):
        if name not in PER_IMAGE and not all(_same(getattr(common, name), getattr(one, name)) for one in requests):
            raise ValueError(f"{name} differs between requests that are drawn together; draw them one after another.")
    if common.tile is not None:
        check_size("tile", (common.tile, common.tile), family.grain, "what the denoiser halves to whole numbers")
    if common.clip_skip >= family.text_layers:
        raise ValueError(
            f"clip_skip is {common.clip_skip}; this model's text encoder has {family.text_layers} layers, so it must "
            f"be from 0 to {family.text_layers - 1}."
        )
    _check_beside(common, family)

    for one in requests:
        if one.control_image and len(one.control_image) != (n := len(model.controls)):
            nets = f"{n} control network{'s' if n > 1 else ''}; give an image for each"
            nets = nets if n else "no control network; give it by controls= (--control)"
            raise ValueError(
                f"There are {len(one.control_image)} of control_image, and the model was loaded with {nets}."
            )
    _check_image_prompts(requests, model)
    size = image_size(common, family, model.size)
    enlarges = family.beside == "small image"
    canvases = [None if enlarges else canvas_of(one, family, model.size) for one in requests]
    small = [pixels_of(one.image) for one in requests if enlarges and one.image is not None]
    if shapes := {image.shape for image in small} - {(size[1] // family.factor, size[0] // family.factor, 3)}:
        height, width, _ = shapes.pop()
        raise ValueError(f"Images that are drawn together must have one size; they have {size} and "
                         f"{(width * family.factor, height * family.factor)}.")  # fmt: skip
    images = [canvas.image for canvas in canvases if canvas is not None]
    masks = [canvas.mask for canvas in canvases if canvas is not None and canvas.mask is not None]
    for one, image in zip(requests, images, strict=False):
        if image.shape != images[0].shape:
            shape = image_size(one, family, model.size)
            raise ValueError(f"Images that are drawn together must have one size; they have {size} and {shape}.")
    if common.control_image:
        for net in model.controls:
            family.check_control(net, size, common.tile is not None)
    hints = [control_images(one, image_size(one, family, model.size)) for one in requests]
    if len({len(some) for some in hints}) > 1:
        raise ValueError("control_image is given for some of the requests; give it for all that are drawn together.")
    if sizes := {image.shape for some in hints for image in some} - {(size[1], size[0], 3)}:
        height, width, _ = sizes.pop()
        raise ValueError(f"Images that are drawn together must have one size; they have {size} and {(width, height)}.")
    shape = latent_shape(size, family)
    for one in requests:
        if one.latents is not None and one.latents.shape != shape:
            raise ValueError(
                f"latents have the shape {one.latents.shape}; it must be {shape}: height, width, channels."
            )
    numbers = family.numbers(
        size,
        common.original_size or size,  # pyright: ignore[reportArgumentType]
        common.crop or (0, 0),
        AESTHETIC_SCORE if common.aesthetic_score is None else common.aesthetic_score,
        common.guidance or 0.0,
        noise_level := _noise_level(common, model),
    )
    depths = [depth_map(one.depth, shape[:2]) for one in requests if one.depth is not None]
    _check_memory(family, len(requests), size, model.dtype)
    schedule = make_schedule(model.scheduler)
    settings: Any = common  # they are filled in
    sigmas = make_sigmas(settings.sampler, settings.schedule, model.scheduler, schedule, settings.steps, common.eta)
    return Drawing(
        requests=requests,
        shape=shape,
        sigmas=sigmas,
        at_sigma=starts_at_sigma(settings.sampler, settings.schedule, model.scheduler),
        steps=count_steps(sigmas),
        image=np.stack(images) if images else None,
        mask=np.stack(masks) if masks else None,
        hints=tuple(np.stack(some) for some in zip(*hints, strict=True)),
        prompt_pixels=_prompt_pixels(requests, model),
        prompt_scales=_for_each(common.image_prompt_scale, model.ip_adapters),
        small=np.stack(small) if small else None,
        image_noise=(noised := family.image_noise(shape)),
        noise_level=(0.0, 1.0) if noised is None else _share(model.noising, noise_level),
        numbers=numbers,
        zero_empty=model.zero_empty,
        edits=family.beside == "image",
        depth=np.stack(depths) if depths else None,
        embeds_guidance=family.embeds_guidance,
    )


def _noise_level(request: Request, model: ModelInfo) -> int:
    """How much noise the image that the denoiser reads shall have, as a training step; 0 where it reads none.

    Raises:
        ValueError: where the model has no such level.
    """
    given, enlarges = request.noise_level, model.family.beside == "small image"
    if model.noising is None or not (enlarges or model.family.IMAGE_READERS):
        if given is not None:
            raise ValueError(f"noise_level is {given}; this model reads no image with noise, so leave it out.")
        return 0
    level = given if given is not None else SMALL_NOISE if enlarges else 0
    most = model.noising.num_train_timesteps - 1
    if enlarges:
        most = min(most, MOST_SMALL_NOISE)
    if level > most:
        raise ValueError(f"noise_level is {level}; this model's are from 0 to {most}.")
    return level


def _share(noising: SchedulerConfig | None, level: int) -> tuple[float, float]:
    """A noise level, and the share of the image in the variance there."""
    assert noising is not None, "a model that noises an image has a schedule for it"
    return float(level), float(make_schedule(noising).alpha_bar[level])


def _check_image_prompts(requests: Sequence[Request], model: ModelInfo) -> None:
    """Whether there are as many images and scales as IP-Adapters, or the model itself, want, and prompts where they are
    read.

    Raises:
        ValueError: in one sentence.
    """
    adapters, family = model.ip_adapters, model.family
    if not family.TEXT_ENCODERS:
        for one in requests:
            texts = (one.prompt, one.negative_prompt, one.to_prompt, one.source_prompt)
            if any(texts) or one.regions:
                raise ValueError('This model reads an image and no prompt; give image_prompt, and "" as the prompt.')
    if family.IMAGE_READERS:
        if any(len(one.image_prompt) != 1 for one in requests):
            raise ValueError("This model reads an image in the prompt's place, or beside it; give one as image_prompt.")
        if requests[0].image_prompt_scale != (1.0,):
            raise ValueError("image_prompt_scale is for IP-Adapters; this model reads the image itself, so leave it "
                             "out.")  # fmt: skip
        return
    counts = [len(one.image_prompt) for one in requests]
    if len(set(counts)) > 1:
        raise ValueError(f"Requests that are drawn together have {min(counts)} and {max(counts)} of image_prompt; give "
                         "all as many.")  # fmt: skip
    if counts[0] and not adapters:
        raise ValueError("image_prompt is given, and the model was loaded with no IP-Adapter; give it by ip_adapters= "
                         "(--ip-adapter).")  # fmt: skip
    if counts[0] and adapters > 1 and counts[0] != adapters:
        raise ValueError(f"There are {counts[0]} of image_prompt for {adapters} IP-Adapters; give one for each.")
    scales = len(requests[0].image_prompt_scale)
    if scales not in (1, adapters):
        raise ValueError(f"There are {scales} of image_prompt_scale for {adapters} IP-Adapters; give one, or one each.")


def _for_each(values: tuple[float, ...], n: int) -> tuple[float, ...]:
    """`n` values, of which one may stand for all."""
    return values * n if len(values) == 1 else values


def _prompt_pixels(requests: Sequence[Request], model: ModelInfo) -> tuple[Float32[np.ndarray, "b n s s 3"], ...]:
    """The images of all requests for each IP-Adapter."""
    if model.image_pixels is None or not requests[0].image_prompt:
        return ()
    found = np.stack([[model.image_pixels(pixels_of(image)) for image in one.image_prompt] for one in requests])
    return (found,) if model.ip_adapters <= 1 else tuple(found[:, i : i + 1] for i in range(model.ip_adapters))


def _check_beside(request: Request, family: Family) -> None:
    """Whether the request gives what the denoiser reads beside a latent, and no more.

    Raises:
        ValueError: in one sentence.
    """
    kind = family.beside
    if kind == "mask" and request.mask is None and request.outpaint is None:
        raise ValueError("This model is for inpainting; give an image and a mask.")
    if kind == "small image" and request.image is None:
        raise ValueError("This model enlarges an image; give the image.")
    if kind == "image" and request.image is None:
        raise ValueError("This model edits an image, and the prompt says how; give the image.")
    if (kind == "depth") != (request.depth is not None):
        raise ValueError("This model draws by a depth map; give it as depth." if kind == "depth" else
                         "depth is for models that read a depth map, and this one does not; leave it out.")  # fmt: skip
    if kind != "image" and request.image_guidance is not None:
        raise ValueError("image_guidance is for models that edit images by instruction; leave it out.")
    if kind in ("image", "small image"):
        does = "edits" if kind == "image" else "enlarges"
        for name in ("mask", "outpaint", "invert", "upscale"):
            if getattr(request, name) is not None:
                raise ValueError(f"This model {does} the whole image; leave out {name}.")
        if request.latent_upscale > 1 or request.strength != 1:
            raise ValueError(f"This model {does} the image from noise; leave out strength and latent_upscale.")


def check_read(request: Request, families: Sequence[Family]) -> None:
    """Refuses what a request tells denoisers and none of them reads.

    Raises:
        ValueError: in a sentence.
    """
    for name in ("original_size", "crop", "aesthetic_score"):
        if getattr(request, name) is not None and not any(name in family.READS for family in families):
            raise ValueError(f"{name} is {getattr(request, name)}; this model does not read it, so leave it out.")


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except ValueError:  # regions with masks are compared by what they are made of
        pairs = zip(a, b, strict=False)
        return len(a) == len(b) and all(np.array_equal(x.box, y.box) and x.prompt == y.prompt for x, y in pairs)


def _drawn_back_by(request: Request) -> str:
    """The sampler that goes from an inverted image's noise to the image."""
    sampler, _ = INVERSIONS[str(request.invert)]
    if request.sampler not in (None, "ddim", sampler):
        raise ValueError(
            f"invert {request.invert!r} draws with the sampler {sampler}; leave out sampler {request.sampler!r}."
        )
    if request.eta:
        raise ValueError(f"eta is {request.eta:g}, and adds noise that invert has not found; leave it at 0.")
    return sampler


def _check_memory(family: Family, b: int, size: Size, dtype: DTypeLike) -> None:
    """Refuses what a CPU's memory cannot hold by any means, for which the system kills a process without a word.

    Accelerators say themselves when theirs is short.
    """
    if jax.default_backend() != "cpu":
        return
    # The decoder's last level turns the features of the one before into its own; nothing else is as large.
    needed = b * math.prod(size) * family.decoder_channels * np.dtype(dtype).itemsize
    if needed > memory_bytes():
        raise ValueError(
            f"{b} x {size[0]}x{size[1]} pixels need at least {needed / 1e9:.0f} GB, and this machine has "
            f"{memory_bytes() / 1e9:.0f} GB; use a smaller size, or fewer prompts at once."
        )
