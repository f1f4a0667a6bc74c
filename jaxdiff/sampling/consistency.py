"""Few-step samplers of distilled models: each step goes to a low level, and fresh noise leads up to the next."""

import jax.numpy as jnp

from jaxdiff.sampling.loop import History, NoiseFn, Step, StepFn, clipped
from jaxdiff.types import DenoiseFn, Latent


def lcm(denoise_fn: DenoiseFn, noise_fn: NoiseFn, clip: float | None = None) -> StepFn:
    """Latent consistency models (Luo et al. 2023, algorithm 3): `tcd` at levels where every step ends at sigma 0.

    c_skip and c_out of the boundary condition are taken as 0 and 1. They differ from that by less than 1e-5 at all
    levels that such models are distilled at.
    """
    return tcd(clipped(denoise_fn, clip), noise_fn)


def tcd(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, strategic stochastic sampling).

    A step leaves x at `sigma_next`, and the one after climbs from there to its own `sigma` with fresh noise. How far
    down a step goes is the paper's gamma, an argument of the levels (`sigmas.TCD`).
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        low = step.sigma_reached
        # The loop scaled x from unit variance to that of `sigma`, but it was left at `low`.
        x_low = x * jnp.sqrt((1 + low**2) / (1 + step.sigma**2))
        # The product is exactly 0 where the levels are equal, which a difference of squares need not be.
        climb = jnp.sqrt(jnp.maximum((step.sigma - low) * (step.sigma + low), 0))
        climbed = x_low + climb * noise_fn(step.index - 1)
        x = jnp.where(step.taken > 0, climbed, x)
        x_0 = denoise_fn(x, step.sigma)
        return x_0 + step.sigma_next / step.sigma * (x - x_0), history

    return step_fn
