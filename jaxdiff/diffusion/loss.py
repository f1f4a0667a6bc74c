"""The training loss (Ho et al. 2020, eq. 14) and its weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from jaxdiff.diffusion.denoiser import target
from jaxdiff.diffusion.schedule import Schedule
from jaxdiff.types import Context, Key

# (x_in [b h w c], t [b], context [b t d]) -> epsilon, v or x_0 [b h w c]
BatchNetworkFn = Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]


def diffusion_loss(
    network_fn: BatchNetworkFn,
    x_0: Float[Array, "b h w c"],
    context: Context,
    key: Key,
    index: Integer[Array, " b"],
    *,
    schedule: Schedule,
    prediction_type: str,
    min_snr_gamma: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean squared error of one denoising step, each sample at its own random noise level.

    Args:
        network_fn: the network, parameters bound.
        x_0: clean latents, scaled to unit variance.
        context: the captions' features.
        key: the run's key.
        index: global sample numbers. A sample's draws depend on (key, index) alone, so not on batch, host or mesh.
        schedule: the noise levels.
        prediction_type: epsilon, v_prediction or sample.
        min_snr_gamma: weighs with `min_snr_weight`; None weighs all levels alike.

    Returns:
        The loss, and `mse`, which is the loss before weights.
    """
    t, eps = jax.vmap(lambda i: draw(jax.random.fold_in(key, i), x_0.shape[1:], len(schedule.alpha_bar)))(index)
    sigma = jnp.asarray(schedule.sigmas, jnp.float32)[t]
    level = sigma[:, None, None, None]
    out = network_fn(add_noise(x_0, eps, level), t.astype(jnp.float32), context).astype(jnp.float32)
    error = jnp.mean((out - target(x_0, eps, level, prediction_type)) ** 2, axis=(1, 2, 3))
    weight = 1.0 if min_snr_gamma is None else min_snr_weight(sigma, prediction_type, min_snr_gamma)
    return jnp.mean(weight * error), {"mse": jnp.mean(error)}


def draw(key: Key, shape: tuple[int, ...], steps: int) -> tuple[Int[Array, ""], Float[Array, "..."]]:
    """One sample's training step, uniform in [0, steps), and its standard normal noise."""
    t_key, noise_key = jax.random.split(key)
    return jax.random.randint(t_key, (), 0, steps), jax.random.normal(noise_key, shape)


def add_noise(x_0: Float[Array, "*b"], eps: Float[Array, "*b"], sigma: Float[Array, "*_"]) -> Float[Array, "*b"]:
    """The network's input at level `sigma`: x_0 + sigma * eps, at unit variance (Ho et al. 2020, eq. 4)."""
    return (x_0 + sigma * eps) / jnp.sqrt(1 + sigma**2)


def min_snr_weight(sigma: Float[Array, " b"], prediction_type: str, gamma: float) -> Float[Array, " b"]:
    """What makes the error in x_0 weigh min(SNR, gamma) (Hang et al. 2023, section 3.4), SNR being 1 / sigma^2.

    The error in epsilon is SNR times the error in x_0, the error in v SNR + 1 times.
    """
    snr = 1 / sigma**2
    return jnp.minimum(snr, gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction_type]
