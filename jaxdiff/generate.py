"""From tokens to pixels: one compiled program, written for one image and `vmap`ped."""

from collections.abc import Callable
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
from jaxdiff.sampling.ddim import ddim
from jaxdiff.sampling.grids import Grid
from jaxdiff.types import Params

# Each takes (denoise_fn, x_T, grid, key, *, start, stop, eta, clip), as `ddim` does.
SAMPLERS: dict[str, Callable[..., Array]] = {"ddim": ddim}


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
    x_T: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    grid: Grid,
    start: Int[Array, ""],
    stop: Int[Array, ""],
    steps: Int[Array, ""],
    guidance: Float[Array, ""],
    eta: Float[Array, ""],
    *,
    program: Program,
) -> tuple[Float[Array, "b h w c"], UInt8[Array, "b h2 w2 3"]]:
    """Draws one image for each row. Nothing but shapes, `program` and the types of the params makes it compile anew.

    Args:
        params: the trees of "text_encoder", "unet" and "vae".
        tokens: each image's negative prompt and prompt, in this order.
        x_T: unit normal noise, or what an earlier call returned, to go on at step `start`.
        keys: for the noise of `eta`.
        grid: the noise levels.
        start: the first step.
        stop: the step not taken any more. Images are decoded when this is `steps`, and black before.
        steps: how many there are in all.
        guidance: scale of classifier-free guidance; 1 follows the prompt alone.
        eta: DDIM's share of fresh noise, 0 to 1.
        program: networks and settings.

    Returns:
        The latents (scaled to unit variance) and the images.
    """
    scheduler = program.scheduler
    schedule = make_schedule(scheduler)
    clip = scheduler.clip_sample_range if scheduler.clip_sample else None

    def sample(tokens: Int[Array, "2 t"], x: Float[Array, "h w c"], key: Key[Array, ""]) -> Float[Array, "h w c"]:
        context = program.text_encoder.apply({"params": params["text_encoder"]}, tokens)

        def network_fn(x_in: Float[Array, "2 h w c"], t: Float[Array, ""]) -> Float[Array, "2 h w c"]:
            return program.unet.apply({"params": params["unet"]}, x_in, jnp.full(2, t), context)  # pyright: ignore

        both = make_denoiser(network_fn, schedule, scheduler.prediction_type)
        denoise_fn = classifier_free_joint(both, guidance)
        return SAMPLERS[program.sampler](denoise_fn, x, grid, key, start=start, stop=stop, eta=eta, clip=clip)

    def decode(x: Float[Array, "h w c"]) -> UInt8[Array, "h2 w2 3"]:
        image = program.vae.apply({"params": params["vae"]}, x[None] / program.scaling_factor, method="decode")[0]
        return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)  # pyright: ignore

    x = jax.vmap(sample)(tokens, x_T, keys)
    b, h, w, _ = x.shape
    factor = 2 ** (len(program.vae.channels) - 1)
    black = jnp.zeros((b, factor * h, factor * w, 3), jnp.uint8)
    return x, jax.lax.cond(stop == steps, jax.vmap(decode), lambda _: black, x)
