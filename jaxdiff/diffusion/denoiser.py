"""From a network and what it was trained to predict to a `DenoiseFn`, and back."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.diffusion.schedule import Schedule
from jaxdiff.types import DenoiseFn, Latent, Sigma

# (x_in, t) -> what the network predicts; x_in is what `network_input` makes of x, and t `Schedule.times`.
NetworkFn = Callable[[Latent, Float[Array, ""]], Latent]
# Noise levels and latents that broadcast: a number and an image, or [b, 1, 1, 1] and a batch.
Levels = Float[Array, "*_"]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def make_denoiser(network_fn: NetworkFn, schedule: Schedule, prediction_type: str) -> DenoiseFn:
    """The network as a `DenoiseFn`; a level between two training steps gets a `t` between them, too.

    Raises:
        ValueError: for a `prediction_type` that is not among `PREDICTIONS`.
    """
    _check(prediction_type)

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        x_in = network_input(x, sigma, prediction_type)
        out = network_fn(x_in, sigma_to_t(sigma, schedule)).astype(jnp.float32)
        return to_x_0(out, x, sigma, prediction_type)

    return denoise


def network_input(x: Float[Array, "*b"], sigma: Levels, prediction_type: str) -> Float[Array, "*b"]:
    """x = x_0 + sigma * eps as the network takes it.

    At unit variance, sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4); for flow matching on the
    straight line (1 - t) x_0 + t eps, where sigma = t / (1 - t) (Liu et al. 2023, eq. 1).
    """
    return x / (1 + sigma if prediction_type == "flow_prediction" else jnp.sqrt(1 + sigma**2))


def to_x_0(out: Float[Array, "*b"], x: Float[Array, "*b"], sigma: Levels, prediction_type: str) -> Float[Array, "*b"]:
    """The clean latent that the network's output stands for.

    v is Salimans & Ho 2022, appendix D; the flow's answer is the line's direction, eps - x_0.
    """
    if prediction_type == "epsilon":
        return x - sigma * out
    if prediction_type == "v_prediction":
        return x / (1 + sigma**2) - out * sigma / jnp.sqrt(1 + sigma**2)
    if prediction_type == "flow_prediction":
        return (x - sigma * out) / (1 + sigma)
    return out


def target(x_0: Float[Array, "*b"], eps: Float[Array, "*b"], sigma: Levels, prediction_type: str) -> Float[Array, "*b"]:
    """What the network should have answered: the inverse of `to_x_0`."""
    _check(prediction_type)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return (eps - sigma * x_0) / jnp.sqrt(1 + sigma**2)
    if prediction_type == "flow_prediction":
        return eps - x_0
    return x_0


def sigma_to_t(sigma: Sigma, schedule: Schedule) -> Float[Array, ""]:
    """What the network takes as the time of a noise level: `Schedule.times` at the schedule's own levels.

    Between two training steps it is linear in log sigma; for flow matching it is a formula.
    """
    if schedule.flow:
        return len(schedule.alpha_bar) * sigma / (1 + sigma)
    log_sigmas = np.log(schedule.sigmas).astype(np.float32)
    t = jnp.interp(jnp.log(sigma), log_sigmas, jnp.arange(len(log_sigmas), dtype=jnp.float32))
    nearest = jnp.round(t)
    return jnp.where(jnp.abs(t - nearest) < 1e-2, nearest, t)  # float32 logarithms are off by 1e-4 steps


def _check(prediction_type: Any) -> None:
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction_type!r}; supported: {', '.join(PREDICTIONS)}.")
