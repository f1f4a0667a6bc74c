"""From prompts to pixels: few compiled programs, each written for one image and `vmap`ped."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from jaxdiff.compiling import Compiled
from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.canvas import inpainted, windowed
from jaxdiff.diffusion.denoiser import make_denoiser, sigma_to_t
from jaxdiff.diffusion.guidance import Guidance, guided, within
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, perturbed, prompt_keys, structured
from jaxdiff.models.vae import AutoencoderKL, in_slices
from jaxdiff.sampling.inversion import ddim_inversion, edict_inversion
from jaxdiff.sampling.loop import State, keyed_noise, no_noise, sampling_loop
from jaxdiff.sampling.samplers import SAMPLERS
from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.types import DenoiseFn, Latent, Params, Sigma

AnyArray = Array | np.ndarray


@dataclass(frozen=True)
class Program:
    """What the compiled programs are made for; all else is an argument of them."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerConfig
    scaling_factor: float
    sampler: str = "ddim"
    window: tuple[int, int] | None = None
    """Height and width, in latent pixels, of the windows that the network looks through; None is the whole."""
    inpaints: bool = False
    """Whether the network takes a mask and a picture (`Scene.extra`)."""


class Scene(NamedTuple):
    """What an image is of, beside its noise. What is None is not compiled."""

    context: Float[AnyArray, "*b phases prompts t d"]
    """The negative prompt, then each part of the prompt; with `keep`, the source's prompt last."""
    weights: Float[AnyArray, "*b phases parts #h #w 1"]
    """How much each part counts, and where."""
    starts: Float[AnyArray, "*b phases"]
    """Noise levels, falling: a phase holds from its own on. The first is not read."""
    known: Float[AnyArray, "*b h w c"] | None = None
    """The clean latent of what is kept,"""
    mask: Float[AnyArray, "*b h w 1"] | None = None
    """where this is 0,"""
    noise: Float[AnyArray, "*b h w c"] | None = None
    """and its noise."""
    extra: Float[AnyArray, "*b h w d"] | None = None
    """More channels for the network: an inpainting model's mask and picture."""
    noises: Float[AnyArray, "*b n h w c"] | None = None
    """The noise of the steps, in place of the key's."""
    keep: Float[AnyArray, ""] | None = None
    """Down to this noise level, the layout is that of a source, which is drawn beside the image: x is [2, h, w, c]."""


def keys_and_noise(
    seeds: UInt32[Array, " b"], shape: tuple[int, int, int]
) -> tuple[Key[Array, " b"], Float[Array, "b h w c"]]:
    """Each image's key for the steps and its starting noise, from its own seed alone."""

    def draw(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], Float[Array, "h w c"]]:
        step_key, noise_key = jax.random.split(jax.random.key(seed))
        return step_key, jax.random.normal(noise_key, shape)

    return jax.vmap(draw)(seeds)


@partial(Compiled, static_argnames="program")
def read_prompts(
    params: Params,
    ids: Int[Array, "*n chunks length"],
    weights: Float[Array, "*n chunks length"],
    empty: Int[Array, " length"],
    *,
    program: Program,
) -> Float[Array, "*n chunks*length d"]:
    """Tokens to features, one chunk after the other.

    A token of another weight than 1 goes on along the line from the empty prompt's features at its place to its own.
    """
    encoder = program.text_encoder
    rows = jnp.concatenate([empty[None], ids.reshape(-1, ids.shape[-1])])
    nothing, features = jnp.split(encoder.apply({"params": params}, rows), [1])  # pyright: ignore
    features += (weights.reshape(-1, weights.shape[-1], 1) - 1) * (features - nothing)  # weight 1 is exact
    return features.reshape(*ids.shape[:-2], -1, features.shape[-1])


@partial(Compiled, static_argnames="program")
def encode_images(
    params: Params, images: UInt8[Array, "b h2 w2 3"], *, program: Program
) -> Float[Array, "b h w c"]:  # fmt: skip
    """The most likely latents of pictures, scaled to unit variance."""

    def encode(image: UInt8[Array, "h2 w2 3"]) -> Float[Array, "h w c"]:
        moments = program.vae.apply({"params": params}, image[None] / 127.5 - 1, method="encode")[0]
        return program.scaling_factor * moments[..., : program.vae.latent_channels]  # pyright: ignore

    return jax.lax.map(encode, images)


def outline(
    params: dict[str, Params], scene: Scene, state: State, *turned: Any, program: Program
) -> tuple[State, UInt8[Array, "b h2 w2 3"]]:
    """What `text_to_image` returns, as far as shapes go: its state untouched, its images black."""
    *_, h, w, _ = state.x.shape
    factor = 2 ** (len(program.vae.channels) - 1)
    return state, jnp.zeros((len(state.x), factor * h, factor * w, 3), jnp.uint8)


@partial(Compiled, static_argnames="program")
def text_to_image(
    params: dict[str, Params],
    scene: Scene,
    state: State,
    keys: Key[Array, " b"],
    grid: Sigmas,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    steps: Int[Array, ""],
    guidance: Guidance,
    eta: Float[Array, ""],
    every: Int[Array, ""] | None = None,
    *,
    program: Program,
) -> tuple[State, UInt8[Array, "b h2 w2 3"]]:
    """Draws one image for each row. Nothing but shapes, `program`, the types of the params and what is None makes it
    compile anew.

    Args:
        params: the trees of "unet" and "vae".
        scene: what to draw.
        state: `vmap(begin)` of unit normal noise, or what an earlier call returned, to go on at step `start`.
        keys: for the noise of the steps.
        grid: the noise levels.
        start: the first step.
        stop: the step not taken any more. Images are decoded when this is `steps`, and black before.
        steps: how many there are in all.
        guidance: classifier-free guidance and its kin; scale 1 follows the prompt alone.
        eta: the share of fresh noise in DDIM's steps, 0 to 1.
        every: deep features are computed at steps `start`, `start + every` and so on; None computes all of them.
        program: networks and settings.

    Returns:
        The state, with the latents (scaled to unit variance), and the images.
    """
    sampler, scheduler = SAMPLERS[program.sampler], program.scheduler
    given = {"eta": eta, "clip": scheduler.clip_sample_range if scheduler.clip_sample else None}
    sampler_fn = partial(sampler.fn, **{name: given[name] for name in sampler.options})
    keys_values = prompt_keys(params["unet"], jnp.asarray(scene.context), program.unet.dtype)

    def sample(scene: Scene, keys_values: Params, state: State, key: Key[Array, ""]) -> State:
        ask = _network(params["unet"], scene, keys_values, guidance, program)
        noise_fn = keyed_noise(key, state.x.shape) if scene.noises is None else scene.noises.__getitem__

        def walk(deep: Array | None, state: State, start: Array, stop: Array) -> State:
            denoise_fn = _denoiser(partial(ask, deep=deep), scene, guidance, program)
            return sampling_loop(sampler_fn, denoise_fn, noise_fn, state, grid, start, stop)

        def deep_features(x: Array, start: Array, stop: Array) -> Float[Array, "n h w d"]:
            """Those of the step `start`, for the prompt alone if no step before `stop` is guided."""
            sigma = grid.sigmas[start]

            def of(rows: slice) -> Array:
                deep = ask(x * jnp.sqrt(1 + sigma**2), sigma, rows, only_deep=True)
                return jnp.broadcast_to(deep, (len(_prompts(scene, guidance)), *deep.shape[1:]))

            if guidance.low is None or guidance.high is None or not _one_prompt(scene, guidance):
                return of(ALL)
            some = (grid.sigmas_next[stop - 1] <= guidance.high) & (guidance.low <= sigma)
            return jax.lax.cond(some, lambda: of(ALL), lambda: of(ALONE))

        def block(now: tuple[Array, State]) -> tuple[Array, State]:
            i, state = now
            end = jnp.minimum(i + every, stop)  # pyright: ignore[reportOperatorIssue]
            return end, walk(deep_features(state.x, i, end), state, i, end)

        if every is None:
            return walk(None, state, start, stop)
        return jax.lax.while_loop(lambda now: now[0] < stop, block, (start, state))[1]

    def decode(x: Float[Array, "h w c"]) -> UInt8[Array, "h2 w2 3"]:
        image = program.vae.apply({"params": params["vae"]}, x[None] / program.scaling_factor, method="decode")[0]
        return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)  # pyright: ignore

    state = jax.vmap(sample, in_axes=(_axes(scene), 0, 0, 0))(scene, keys_values, state, keys)
    _, black = outline(params, scene, state, program=program)
    drawn = state.x if scene.keep is None else state.x[:, 1]
    if scene.mask is not None and scene.known is not None:
        # The last level may be above 0, and what is kept still noisy there.
        drawn = scene.mask * drawn + (1 - scene.mask) * scene.known
    return state, jax.lax.cond(stop == steps, partial(in_slices, decode), lambda _: black, drawn)


INVERSIONS = {"ddim": ("ddim", ddim_inversion), "exact": ("edict", edict_inversion)}
"""How a picture's noise is found: the sampler that goes the way back, and the one that goes up."""


@partial(Compiled, static_argnames=("method", "program"))
def invert(
    params: dict[str, Params],
    scene: Scene,
    state: State,
    grid: Sigmas,
    steps: Int[Array, ""],
    *,
    method: str,
    program: Program,
) -> State:
    """Clean latents to the states that they would have been drawn from, without guidance.

    Args:
        params: the tree of "unet".
        scene: the prompt that says what is in the picture; its negative prompt is not read.
        state: `vmap(begin)` of clean latents.
        grid: the noise levels turned round, by `jaxdiff.sampling.inversion.backwards`.
        steps: how many there are.
        method: one of `INVERSIONS`.
        program: networks and settings.
    """
    keys_values = prompt_keys(params["unet"], jnp.asarray(scene.context), program.unet.dtype)
    _, inversion = INVERSIONS[method]

    def climb(scene: Scene, keys_values: Params, state: State) -> State:
        ask = _network(params["unet"], scene, keys_values, Guidance(1.0), program)
        return sampling_loop(inversion, lambda x, sigma: ask(x, sigma, ALONE)[0], no_noise, state, grid, 0, steps)

    return jax.vmap(climb, in_axes=(_axes(scene), 0, 0))(scene, keys_values, state)


# The network, as it is asked for one image. It has a row for each guess that guidance reads: the negative prompt's,
# those of the prompt's parts, where attention is perturbed those of the parts once more, and the source's.

ALL, ALONE = slice(None), slice(1, 2)
"""All rows, and that of a prompt of one part."""

# (x, sigma, rows) -> guesses of x_0.
AskFn = Callable[..., Float[Array, "n h w c"]]


def _prompts(scene: Scene, guidance: Guidance) -> list[int]:
    """Each row's prompt."""
    parts = range(1, 1 + scene.weights.shape[-4])
    source = [] if scene.keep is None else [1 + len(parts)]
    return [0, *parts, *([] if guidance.perturbed is None else parts), *source]


def _one_prompt(scene: Scene, guidance: Guidance) -> bool:
    """Whether the row `ALONE` says all that the prompt does."""
    return scene.keep is None and len(_prompts(scene, guidance)) == 2


def _network(params: Params, scene: Scene, keys_values: Params, guidance: Guidance, program: Program) -> AskFn:
    schedule, prediction = make_schedule(program.scheduler), PREDICTIONS[program.scheduler.prediction_type]
    prompts, parts = _prompts(scene, guidance), scene.weights.shape[-4]

    def ask(
        x: Latent,
        sigma: Sigma,
        rows: slice = ALL,
        deep: Float[Array, "rows h w d"] | None = None,
        only_deep: bool = False,
    ) -> Float[Array, "n h w c2"]:
        """The guesses of x_0; or with `only_deep` the network's deep features."""
        chosen = jnp.array(prompts[rows])
        n, phase = len(chosen), _phase(scene, sigma)
        variables = {"params": params, "prompt": jax.tree.map(lambda kv: kv[phase][chosen], keys_values)}
        if guidance.perturbed is not None:
            row = jnp.arange(n)
            variables["rows"] = perturbed(params, (parts < row) & (row <= 2 * parts))
        if scene.keep is not None:
            source = jnp.where(sigma >= scene.keep, n - 1, jnp.arange(n))
            variables["rows"] = variables.get("rows", {}) | structured(params, source)

        def network(x_in: Float[Array, "n h w c"], t: Float[Array, ""]) -> Array:
            kept, context = None if deep is None else deep[rows], scene.context[phase][chosen]
            return program.unet.apply(variables, x_in, jnp.full(n, t), context, kept, only_deep=only_deep)  # pyright: ignore

        def with_extra(x_in: Float[Array, "n h w c"], t: Float[Array, ""]) -> Array:
            extra = [] if scene.extra is None else [jnp.broadcast_to(scene.extra, (n, *scene.extra.shape))]
            look = network if program.window is None else windowed(network, program.window)
            return look(jnp.concatenate([x_in, *extra], axis=-1), t)

        x = jnp.stack([x] * n if scene.keep is None else [x[1]] * (n - 1) + [x[0]])
        if only_deep:
            return with_extra(prediction.network_input(x, sigma), sigma_to_t(sigma, schedule))
        return make_denoiser(with_extra, schedule, prediction)(x, sigma)

    return ask


def _denoiser(ask: AskFn, scene: Scene, guidance: Guidance, program: Program) -> DenoiseFn:
    def combine(guess_fn: Callable[[Latent, Sigma], Array]) -> DenoiseFn:
        weights, prediction = scene.weights, PREDICTIONS[program.scheduler.prediction_type]
        return guided(guess_fn, lambda sigma: weights[_phase(scene, sigma)], guidance, prediction)

    def beside_source(x: Float[Array, "2 h w c"], sigma: Sigma) -> Float[Array, "2 h w c"]:
        guesses = ask(x, sigma)
        return jnp.stack([guesses[-1], combine(lambda *_: guesses[:-1])(x[1], sigma)])

    denoise_fn = combine(ask) if scene.keep is None else beside_source
    if guidance.low is not None and _one_prompt(scene, guidance):  # the others' rows are needed at every level
        denoise_fn = within(denoise_fn, lambda x, sigma: ask(x, sigma, ALONE)[0], guidance)
    if scene.mask is not None:
        denoise_fn = inpainted(denoise_fn, scene.known, scene.mask, scene.noise)  # pyright: ignore
    return denoise_fn


def _phase(scene: Scene, sigma: Sigma) -> Int[Array, ""] | int:
    return 0 if len(scene.context) == 1 else (sigma <= scene.starts[1:]).sum()


def _axes(scene: Scene) -> Scene:
    """Over what is mapped: all but `keep`, which is the same for all images."""
    return Scene(*(None if value is None or value is scene.keep else 0 for value in scene))  # pyright: ignore
