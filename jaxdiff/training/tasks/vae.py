"""The autoencoder: reconstruct, and keep the latents near a standard normal (Rombach et al. 2022, section 3.1)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff import build
from jaxdiff.build import Remat
from jaxdiff.config import DataConfig, VAETask
from jaxdiff.runtime.compile import Compiled
from jaxdiff.training.inputs import LossInputs
from jaxdiff.training.noise import normal_like
from jaxdiff.training.state import Batch, Metrics, Notes, Task, apply, merge
from jaxdiff.types import Key, Params

ENCODER = ("encoder", "quant_conv")  # the half that makes latents


def split_moments(moments: Float[Array, "b h w c2"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Mean and standard deviation of the posterior; the log-variance is clipped as diffusers clips it."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))


def sample_moments(moments: Float[Array, "b h w c2"], index: Array, key: Key) -> Float[Array, "b h w c"]:
    """A draw from each posterior, keyed by the sample's index (Kingma & Welling 2014, eq. 10)."""
    mean, std = split_moments(moments)
    return mean + std * normal_like(key, index, mean)


def vae_inputs(config: VAETask, data: DataConfig) -> LossInputs:
    """A batch holds "image" [b, h, w, 3] and "index" [b]; `ENCODER` is frozen where the decoder is trained alone."""
    b, (height, width) = data.batch_size, data.shapes[0]
    shapes = build.param_shapes(build.vae(config.vae), config.vae)
    frozen = {} if config.train_encoder else {name: shapes[name] for name in ENCODER if name in shapes}
    return LossInputs(
        batch={
            "index": jax.ShapeDtypeStruct((b,), jnp.int32),
            "image": jax.ShapeDtypeStruct((b, height, width, 3), jnp.float32),
        },
        trained=tuple(name for name in shapes if name not in frozen),
        frozen=frozen,
    )


def vae_task(
    config: VAETask,
    frozen: Params,
    start: Params | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
) -> Task:
    """Training of the autoencoder. Its params are the parts that are not frozen.

    Args:
        config: what is trained, and how.
        frozen: what `vae_inputs` says, as weights or as shapes.
        start: the first params in place of random ones.
        dtype: what the network computes in.
        remat: what the backward pass computes again.
    """
    module = build.vae(config.vae, dtype, remat)

    def init(key: Key) -> Params:
        return {name: tree for name, tree in build.init(module, config.vae, key).items() if name not in frozen}

    def loss(
        params: Params, frozen: Params, batch: Batch, key: Key, memory: Any
    ) -> tuple[Float[Array, ""], Metrics, Notes]:
        image, params = batch["image"], merge(frozen, params)
        moments = apply(module, params, image, method="encode")
        z = sample_moments(moments, batch["index"], key)
        copy = apply(module, params, z, method="decode")
        error = copy - image
        l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
        mean, std = split_moments(moments)
        # Against N(0, 1), for each latent value (Kingma & Welling 2014, appendix B).
        kl = 0.5 * (jnp.square(mean) + jnp.square(std) - 2 * jnp.log(std) - 1).mean()
        loss = config.l1_weight * l1 + l2 + config.kl_weight * kl
        # Of each image, as `psnr` has it: means over images are the same in micro-batches.
        off = jnp.square((jnp.clip(copy, -1, 1) - image) / 2).mean((1, 2, 3))
        return loss, {"l1": l1, "psnr": -10 * jnp.log10(jnp.maximum(off, 1e-10)).mean(), "kl": kl}, {}

    return Task(init, loss, start, frozen)


def reconstruct(config: VAETask, dtype: DTypeLike = jnp.float32) -> Callable[..., tuple[Array, Array]]:
    """A compiled `(params, image [b,h,w,3]) -> (reconstruction, moments)` that takes the posterior's mean."""
    module = build.vae(config.vae, dtype)

    @Compiled
    def run(params: Params, image: Array) -> tuple[Array, Array]:
        moments = apply(module, params, image, method="encode")
        mean, _ = split_moments(moments)
        return apply(module, params, mean, method="decode"), moments

    return run


def psnr(a: Float[np.ndarray, "b h w c"], b: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, " b"]:
    """Peak signal-to-noise ratio of each image in dB; both lie in [-1, 1], and what `b` has outside is clipped."""
    error = np.square((a - b.clip(-1, 1)).astype(np.float64) / 2).mean((1, 2, 3))
    return -10 * np.log10(np.maximum(error, 1e-10))


def latent_scale(moments: list[np.ndarray]) -> float:
    """1 / the standard deviation of the latents that have these moments: what brings them to unit variance."""
    means, stds = zip(*(np.split(m, 2, axis=-1) for m in moments), strict=True)
    mean, std = np.concatenate(means), np.exp(0.5 * np.concatenate(stds).clip(-30, 20))
    return float(1 / np.sqrt(mean.var() + np.square(std).mean()))
