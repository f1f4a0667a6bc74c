"""From a network and what it was trained to predict to a `DenoiseFn`, and back."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedule import Schedule
from jaxdiff.types import DenoiseFn, Latent, Sigma

# (x_in, t) -> epsilon, v or x_0, where x_in = x / sqrt(1 + sigma^2) has unit variance and t is the training step.
NetworkFn = Callable[[Latent, Float[Array, ""]], Latent]
# Noise levels and latents that broadcast: a number and an image, or [b, 1, 1, 1] and a batch.
Levels = Float[Array, "*_"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def make_denoiser(network_fn: NetworkFn, schedule: Schedule, prediction_type: str) -> DenoiseFn:
    """The network as a `DenoiseFn`; a level between two training steps gets a `t` between them, too.

    Raises:
        ValueError: for a `prediction_type` other than epsilon, v_prediction and sample.
    """
    _check(prediction_type)

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        x_in = x / jnp.sqrt(1 + sigma**2)
        out = network_fn(x_in, sigma_to_t(sigma, schedule)).astype(jnp.float32)
        return to_x_0(out, x, sigma, prediction_type)

    return denoise


def to_x_0(out: Float[Array, "*b"], x: Float[Array, "*b"], sigma: Levels, prediction_type: str) -> Float[Array, "*b"]:
    """The clean latent that the network's output stands for; v is Salimans & Ho 2022, appendix D."""
    if prediction_type == "epsilon":
        return x - sigma * out
    if prediction_type == "v_prediction":
        return x / (1 + sigma**2) - out * sigma / jnp.sqrt(1 + sigma**2)
    return out


def target(x_0: Float[Array, "*b"], eps: Float[Array, "*b"], sigma: Levels, prediction_type: str) -> Float[Array, "*b"]:
    """What the network should have answered: the inverse of `to_x_0`."""
    _check(prediction_type)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return (eps - sigma * x_0) / jnp.sqrt(1 + sigma**2)
    return x_0


def sigma_to_t(sigma: Sigma, schedule: Schedule) -> Float[Array, ""]:
    """The training step of a noise level: exact on the schedule's own levels, linear in log sigma between them."""
    log_sigmas = np.log(schedule.sigmas).astype(np.float32)
    t = jnp.interp(jnp.log(sigma), log_sigmas, jnp.arange(len(log_sigmas), dtype=jnp.float32))
    nearest = jnp.round(t)
    return jnp.where(jnp.abs(t - nearest) < 1e-2, nearest, t)  # float32 logarithms are off by 1e-4 steps


def _check(prediction_type: Any) -> None:
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction_type!r}; supported: {', '.join(PREDICTIONS)}.")
