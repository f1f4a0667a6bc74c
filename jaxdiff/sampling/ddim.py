"""Denoising diffusion, implicit and probabilistic (Song et al. 2021, Ho et al. 2020)."""

import jax.numpy as jnp

from jaxdiff.sampling.euler import euler_ancestral
from jaxdiff.sampling.loop import History, NoiseFn, Scalar, Step, StepFn, ancestral, clipped, to_eps
from jaxdiff.types import DenoiseFn, Latent


def ddim(denoise_fn: DenoiseFn, noise_fn: NoiseFn, eta: Scalar = 0.0, clip: float | None = None) -> StepFn:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12, divided by sqrt(alpha_bar_next)); first order.

    Args:
        denoise_fn: the model.
        noise_fn: gives the noise.
        eta: the share of fresh noise; 0 is deterministic, 1 as random as ancestral sampling (eq. 16).
        clip: keeps the guess of x_0 in [-clip, clip]; the guess of the noise is not clipped, as in diffusers.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        noise = noise_fn(step.index)
        x_0 = denoise_fn(x, step.sigma)
        eps = to_eps(x, x_0, step.sigma)
        if clip is not None:
            x_0 = jnp.clip(x_0, -clip, clip)
        s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
        return x_0 + s_down * eps + s_up * noise, history

    return step_fn


def ddpm(denoise_fn: DenoiseFn, noise_fn: NoiseFn, clip: float | None = None) -> StepFn:
    """Denoising diffusion probabilistic models (Ho et al. 2020, algorithm 2, with the variance of eq. 7).

    Divided by sqrt(alpha_bar_next), the posterior is the ancestral step. With `clip` the noise is what is left of x
    beside the clipped x_0, and so the step differs from DDIM's at eta 1.
    """
    return euler_ancestral(clipped(denoise_fn, clip), noise_fn)
