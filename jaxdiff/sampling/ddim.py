"""Denoising diffusion, implicit and probabilistic (Song et al. 2021, Ho et al. 2020)."""

import jax.numpy as jnp

from jaxdiff.sampling.euler import euler_ancestral
from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.walk import Index, NoiseFn, Past, Scalar, State, Step, ancestral, clipped, walk
from jaxdiff.types import DenoiseFn, Latent, Sigma


def ddim(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    eta: Scalar = 0.0,
    clip: float | None = None,
) -> State:
    """Denoising diffusion implicit models (Song et al. 2021), first order.

    Args:
        denoise_fn: the model.
        state: where the walk stands, from `begin` or from an earlier piece of it.
        grid: the noise levels.
        noise_fn: step i takes noise i, where `eta` asks for any.
        start: the first step.
        stop: the step not taken any more. Both ends may be traced, and taken in pieces the steps are the same.
        eta: 0 is deterministic, 1 as random as ancestral sampling (eq. 16).
        clip: keeps the guess of x_0 in [-clip, clip], but not the guess of the noise, as diffusers does.

    Returns:
        The state at `grid.sigmas_next[stop - 1]`.
    """

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        return ddim_step(denoise_fn, x, step.sigma, step.sigma_next, noise_fn(step.i), eta, clip), past

    return walk(step_fn, state, grid, start, stop)


def ddim_step(
    denoise_fn: DenoiseFn,
    x: Latent,
    sigma: Sigma,
    sigma_next: Sigma,
    noise: Latent | Scalar,
    eta: Scalar = 0.0,
    clip: float | None = None,
) -> Latent:
    """x at `sigma` -> x at `sigma_next`: Song et al. 2021, eq. 12, divided by sqrt(alpha_bar_next)."""
    x_0 = denoise_fn(x, sigma)
    eps = (x - x_0) / sigma
    if clip is not None:
        x_0 = jnp.clip(x_0, -clip, clip)
    s_down, s_up = ancestral(sigma, sigma_next, eta)
    return x_0 + s_down * eps + s_up * noise


def ddpm(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    clip: float | None = None,
) -> State:
    """Denoising diffusion probabilistic models (Ho et al. 2020, algorithm 2, with the variance of eq. 7).

    Divided by sqrt(alpha_bar_next), the posterior is the ancestral step; only `clip` differs from DDIM's at eta 1: the
    noise is what is left of x beside the clipped x_0.
    """
    return euler_ancestral(clipped(denoise_fn, clip), state, grid, noise_fn, start=start, stop=stop)
