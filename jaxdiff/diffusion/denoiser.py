"""A network as a `DenoiseFn`."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.types import DenoiseFn, Latent, Sigma

# (x_in, t) -> the network's output; x_in is `Prediction.network_input` of x, and t is `sigma_to_t` of sigma.
NetworkFn = Callable[[Latent, Float[Array, ""]], Latent]


def make_denoiser(network_fn: NetworkFn, schedule: NoiseSchedule, prediction: Prediction) -> DenoiseFn:
    """The network's guess of x_0; at a level between two training steps, the network is told a t between them, too."""

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        x_in = prediction.network_input(x, sigma)
        out = network_fn(x_in, sigma_to_t(sigma, schedule)).astype(jnp.float32)
        return prediction.x_0(out, x, sigma)

    return denoise


def sigma_to_t(sigma: Sigma, schedule: NoiseSchedule) -> Float[Array, ""]:
    """The time that the network is told for a noise level; `NoiseSchedule.times` at the schedule's own levels.

    Between two training steps, t is linear in log sigma. For flow matching it is T sigma / (1 + sigma).
    """
    if schedule.flow:
        return len(schedule.alpha_bar) * sigma / (1 + sigma)
    log_sigmas = np.log(schedule.sigmas).astype(np.float32)
    t = jnp.interp(jnp.log(sigma), log_sigmas, jnp.arange(len(log_sigmas), dtype=jnp.float32))
    nearest = jnp.round(t)
    return jnp.where(jnp.abs(t - nearest) < 1e-2, nearest, t)  # float32 logarithms are off by 1e-4 steps
