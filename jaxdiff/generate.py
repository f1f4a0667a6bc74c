"""From tokens to pixels: one compiled program, written for one image and `vmap`ped."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.denoiser import make_denoiser
from jaxdiff.diffusion.guidance import classifier_free_joint
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.samplers import SAMPLERS
from jaxdiff.sampling.walk import State, keyed_noise
from jaxdiff.types import Params


@dataclass(frozen=True)
class Program:
    """What the compiled program is made for; all else is an argument of it."""

    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: SchedulerConfig
    scaling_factor: float
    sampler: str = "ddim"


def keys_and_noise(
    seeds: UInt32[Array, " b"], shape: tuple[int, int, int]
) -> tuple[Key[Array, " b"], Float[Array, "b h w c"]]:
    """Each image's key for the steps and its starting noise, from its own seed alone."""

    def draw(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], Float[Array, "h w c"]]:
        step_key, noise_key = jax.random.split(jax.random.key(seed))
        return step_key, jax.random.normal(noise_key, shape)

    return jax.vmap(draw)(seeds)


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
    guidance: Float[Array, ""],
    eta: Float[Array, ""],
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
        guidance: scale of classifier-free guidance; 1 follows the prompt alone.
        eta: the share of fresh noise in DDIM's steps, 0 to 1.
        program: networks and settings.

    Returns:
        The state, with the latents (scaled to unit variance), and the images.
    """
    scheduler, sampler = program.scheduler, SAMPLERS[program.sampler]
    schedule = make_schedule(scheduler)
    given = {"eta": eta, "clip": scheduler.clip_sample_range if scheduler.clip_sample else None}
    options = {name: given[name] for name in sampler.options}

    def sample(tokens: Int[Array, "2 t"], state: State, key: Key[Array, ""]) -> State:
        context = program.text_encoder.apply({"params": params["text_encoder"]}, tokens)

        def network_fn(x_in: Float[Array, "2 h w c"], t: Float[Array, ""]) -> Float[Array, "2 h w c"]:
            return program.unet.apply({"params": params["unet"]}, x_in, jnp.full(2, t), context)  # pyright: ignore

        both = make_denoiser(network_fn, schedule, scheduler.prediction_type)
        denoise_fn = classifier_free_joint(both, guidance)
        noise_fn = keyed_noise(key, state.x.shape)
        return sampler.fn(denoise_fn, state, grid, noise_fn, start=start, stop=stop, **options)

    def decode(x: Float[Array, "h w c"]) -> UInt8[Array, "h2 w2 3"]:
        image = program.vae.apply({"params": params["vae"]}, x[None] / program.scaling_factor, method="decode")[0]
        return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)  # pyright: ignore

    state = jax.vmap(sample)(tokens, state, keys)
    b, h, w, _ = state.x.shape
    factor = 2 ** (len(program.vae.channels) - 1)
    black = jnp.zeros((b, factor * h, factor * w, 3), jnp.uint8)
    return state, jax.lax.cond(stop == steps, jax.vmap(decode), lambda _: black, state.x)
