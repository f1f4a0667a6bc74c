"""Denoising diffusion implicit models (Song et al. 2021)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.sampling.grids import Grid
from jaxdiff.types import DenoiseFn, Key, Latent, Sigma


def ddim(
    denoise_fn: DenoiseFn,
    x_T: Latent,
    grid: Grid,
    key: Key,
    *,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    eta: Float[Array, ""] | float = 0.0,
    clip: float | None = None,
) -> Latent:
    """Steps `start` ... `stop - 1` of the grid. Both ends may be traced, and taken in pieces the steps are the same.

    Args:
        denoise_fn: the model.
        x_T: where to start, with unit variance: pure noise, or x / sqrt(1 + sigma^2) for x at `grid.sigmas[start]`.
        grid: the noise levels.
        key: for the noise of `eta`; step i draws from `fold_in(key, i)`.
        start: the first step.
        stop: the step not taken any more.
        eta: 0 is deterministic, 1 as random as ancestral sampling (eq. 16).
        clip: keeps the guess of x_0 in [-clip, clip], but not the guess of the noise, as diffusers does.

    Returns:
        x / sqrt(1 + sigma^2) at `grid.sigmas_next[stop - 1]`, which is x_0 itself when that is 0.
    """

    def body(i: Int[Array, ""], x_in: Latent) -> Latent:
        sigma, sigma_next = grid.sigmas[i], grid.sigmas_next[i]
        noise = jax.random.normal(jax.random.fold_in(key, i), x_in.shape)
        x = ddim_step(denoise_fn, x_in * jnp.sqrt(1 + sigma**2), sigma, sigma_next, noise, eta, clip)
        return x / jnp.sqrt(1 + sigma_next**2)

    grid = Grid(*map(jnp.asarray, grid))
    return jax.lax.fori_loop(start, stop, body, x_T)


def ddim_step(
    denoise_fn: DenoiseFn,
    x: Latent,
    sigma: Sigma,
    sigma_next: Sigma,
    noise: Latent,
    eta: Float[Array, ""] | float = 0.0,
    clip: float | None = None,
) -> Latent:
    """x at `sigma` -> x at `sigma_next`: Song et al. 2021, eq. 12 and 16, divided by sqrt(alpha_bar_next).

    With alpha_bar = 1 / (1 + sigma^2), their sigma_t^2 = eta^2 (1 - a')/(1 - a) (1 - a/a') becomes
    s_up^2 = eta^2 sigma'^2 (1 - sigma'^2/sigma^2), and their 1 - a' - sigma_t^2 becomes sigma'^2 - s_up^2.
    """
    x_0 = denoise_fn(x, sigma)
    eps = (x - x_0) / sigma
    if clip is not None:
        x_0 = jnp.clip(x_0, -clip, clip)
    # `maximum` keeps rounding from a negative root where a step stays at its level or takes eta 1.
    s_up = eta * sigma_next * jnp.sqrt(jnp.maximum(1 - (sigma_next / sigma) ** 2, 0))
    s_down = jnp.sqrt(jnp.maximum(sigma_next**2 - s_up**2, 0))
    return x_0 + s_down * eps + s_up * noise
