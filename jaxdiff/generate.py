"""From tokens to pixels: one compiled program, written for one image and `vmap`ped."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.denoiser import make_denoiser, network_input, sigma_to_t
from jaxdiff.diffusion.guidance import Guidance, classifier_free_joint, within
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel, prompt_keys
from jaxdiff.models.vae import AutoencoderKL, in_slices
from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.samplers import SAMPLERS
from jaxdiff.sampling.walk import State, keyed_noise
from jaxdiff.types import DenoiseFn, Params


@dataclass(frozen=True)
class Program:
    """What the compiled program is made for; all else is an argument of it."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerConfig
    scaling_factor: float
    sampler: str = "ddim"
    interval: bool = False
    """Whether guidance has an interval of levels, outside of which the network is asked for the prompt alone."""
    reuse: bool = False
    """Whether the network's deep features are kept over some steps."""


def keys_and_noise(
    seeds: UInt32[Array, " b"], shape: tuple[int, int, int]
) -> tuple[Key[Array, " b"], Float[Array, "b h w c"]]:
    """Each image's key for the steps and its starting noise, from its own seed alone."""

    def draw(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], Float[Array, "h w c"]]:
        step_key, noise_key = jax.random.split(jax.random.key(seed))
        return step_key, jax.random.normal(noise_key, shape)

    return jax.vmap(draw)(seeds)


def outline(
    params: dict[str, Params], tokens: Array, state: State, *turned: Any, program: Program
) -> tuple[State, UInt8[Array, "b h2 w2 3"]]:
    """What `text_to_image` returns, as far as shapes go: its state untouched, its images black."""
    b, h, w, _ = state.x.shape
    factor = 2 ** (len(program.vae.channels) - 1)
    return state, jnp.zeros((b, factor * h, factor * w, 3), jnp.uint8)


@partial(jax.jit, static_argnames="program")
def text_to_image(
    params: dict[str, Params],
    tokens: Int[Array, "b 2 t"],
    state: State,
    keys: Key[Array, " b"],
    grid: Grid,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    steps: Int[Array, ""],
    guidance: Guidance,
    eta: Float[Array, ""],
    every: Int[Array, ""],
    *,
    program: Program,
) -> tuple[State, UInt8[Array, "b h2 w2 3"]]:
    """Draws one image for each row. Nothing but shapes, `program` and the types of the params makes it compile anew.

    Args:
        params: the trees of "text_encoder", "unet" and "vae".
        tokens: each image's negative prompt and prompt, in this order.
        state: `vmap(begin)` of unit normal noise, or what an earlier call returned, to go on at step `start`.
        keys: for the noise of the steps.
        grid: the noise levels.
        start: the first step.
        stop: the step not taken any more. Images are decoded when this is `steps`, and black before.
        steps: how many there are in all.
        guidance: classifier-free guidance; scale 1 follows the prompt alone. The levels are for `program.interval`.
        eta: the share of fresh noise in DDIM's steps, 0 to 1.
        every: for `program.reuse`: deep features are computed at steps `start`, `start + every` and so on.
        program: networks and settings.

    Returns:
        The state, with the latents (scaled to unit variance), and the images.
    """
    scheduler, sampler = program.scheduler, SAMPLERS[program.sampler]
    schedule = make_schedule(scheduler)
    given = {"eta": eta, "clip": scheduler.clip_sample_range if scheduler.clip_sample else None}
    options = {name: given[name] for name in sampler.options}

    b = len(tokens)
    context = program.text_encoder.apply({"params": params["text_encoder"]}, tokens.reshape(2 * b, -1))
    context = context.reshape(b, 2, *context.shape[1:])  # pyright: ignore
    keys_values = prompt_keys(params["unet"], context, program.unet.dtype)

    def sample(context: Float[Array, "2 t d"], keys_values: Params, state: State, key: Key[Array, ""]) -> State:
        def unet(x_in: Float[Array, "n h w c"], t: Float[Array, ""], deep: Array | None, **kwargs: bool) -> Array:
            """The network on both prompts, or on the last alone."""
            n = len(x_in)
            variables = {"params": params["unet"], "prompt": jax.tree.map(lambda kv: kv[-n:], keys_values)}
            deep = None if deep is None else deep[-n:]
            return program.unet.apply(variables, x_in, jnp.full(n, t), context[-n:], deep, **kwargs)  # pyright: ignore

        def denoiser(deep: Float[Array, "2 h w d"] | None = None) -> DenoiseFn:
            both = make_denoiser(lambda x_in, t: unet(x_in, t, deep), schedule, scheduler.prediction_type)
            guided = classifier_free_joint(both, guidance.scale)
            if not program.interval:
                return guided
            alone = make_denoiser(lambda x_in, t: unet(x_in[None], t, deep)[0], schedule, scheduler.prediction_type)
            return within(guided, alone, guidance.low, guidance.high)

        def walk(denoise_fn: DenoiseFn, state: State, start: Array, stop: Array) -> State:
            noise_fn = keyed_noise(key, state.x.shape)
            return sampler.fn(denoise_fn, state, grid, noise_fn, start=start, stop=stop, **options)

        def deep_features(x: Array, start: Array, stop: Array) -> Float[Array, "2 h w d"]:
            """Those of the step `start`, for the negative prompt only if a step before `stop` is guided."""
            sigma = grid.sigmas[start]
            x_in = network_input(x * jnp.sqrt(1 + sigma**2), sigma, scheduler.prediction_type)

            def of(n: int) -> Array:
                deep = unet(jnp.stack([x_in] * n), sigma_to_t(sigma, schedule), None, only_deep=True)
                return jnp.broadcast_to(deep, (2, *deep.shape[1:]))

            if not program.interval:
                return of(2)
            guided = (grid.sigmas_next[stop - 1] <= guidance.high) & (guidance.low <= sigma)
            return jax.lax.cond(guided, lambda: of(2), lambda: of(1))

        def block(now: tuple[Array, State]) -> tuple[Array, State]:
            i, state = now
            end = jnp.minimum(i + every, stop)
            return end, walk(denoiser(deep_features(state.x, i, end)), state, i, end)

        if program.reuse:
            return jax.lax.while_loop(lambda now: now[0] < stop, block, (start, state))[1]
        return walk(denoiser(), state, start, stop)

    def decode(x: Float[Array, "h w c"]) -> UInt8[Array, "h2 w2 3"]:
        image = program.vae.apply({"params": params["vae"]}, x[None] / program.scaling_factor, method="decode")[0]
        return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)  # pyright: ignore

    state = jax.vmap(sample)(context, keys_values, state, keys)
    _, black = outline(params, tokens, state, program=program)
    return state, jax.lax.cond(stop == steps, partial(in_slices, decode), lambda _: black, state.x)
