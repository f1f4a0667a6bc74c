"""One-step samplers of dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 4), and their random kin.

All take what `ddim` takes, and return the state at `grid.sigmas_next[stop - 1]`.
"""

import jax
import jax.numpy as jnp

from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.walk import (
    Index,
    NoiseFn,
    Past,
    Scalar,
    State,
    Step,
    ancestral,
    clipped,
    silence,
    unless_last,
    walk,
)
from jaxdiff.types import DenoiseFn, Latent, Sigma


def euler(denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index) -> State:
    """Euler's method: first order, the same step as DDIM's without eta.

    On a flow's grid it is flow matching's (Lipman et al. 2023): the guesses of x_0 and noise stay, on the straight line
    too.
    """
    return euler_ancestral(denoise_fn, state, grid, silence, start=start, stop=stop, eta=0.0)


def euler_ancestral(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    eta: Scalar = 1.0,
) -> State:
    """Euler's method to below the next level, and noise from there up to it (k-diffusion); first order."""

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
        x_0 = denoise_fn(x, step.sigma)
        return x_0 + s_down / step.sigma * (x - x_0) + s_up * noise_fn(step.i), past

    return walk(step_fn, state, grid, start, stop)


def heun(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    clip: float | None = None,
) -> State:
    """Heun's method, without churn (Karras et al. 2022, algorithm 1): second order, two calls a step."""
    denoise_fn = clipped(denoise_fn, clip)

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        d, width = _slope(denoise_fn, x, step.sigma), step.sigma_next - step.sigma

        def corrected(x_next: Latent) -> Latent:
            return x + width / 2 * (d + _slope(denoise_fn, x_next, step.sigma_next))

        return unless_last(step, corrected, x + width * d), past

    return walk(step_fn, state, grid, start, stop)


def flow_heun(
    denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index
) -> State:
    """Heun's method along the straight line y = (1 - t) x_0 + t eps, dy/dt = eps - x_0 (Liu et al. 2023, section 2.1).

    Here y = x / (1 + sigma) and t = sigma / (1 + sigma). Second order, two calls a step; in another coordinate than
    `heun`, and so with another error.
    """

    def velocity(y: Latent, sigma: Sigma) -> Latent:
        x = y * (1 + sigma)
        x_0 = denoise_fn(x, sigma)
        return (x - x_0) / sigma - x_0

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        y, width = x / (1 + step.sigma), 1 / (1 + step.sigma) - 1 / (1 + step.sigma_next)
        v = velocity(y, step.sigma)

        def corrected(y_next: Latent) -> Latent:
            return y + width / 2 * (v + velocity(y_next, step.sigma_next))

        return unless_last(step, corrected, y + width * v) * (1 + step.sigma_next), past

    return walk(step_fn, state, grid, start, stop)


def dpm2(denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index) -> State:
    """DPM-Solver-2 in sigma: the midpoint method, its middle that of log sigma (Karras et al. 2022, algorithm 2,
    without churn); second order, two calls a step."""
    return dpm2_ancestral(denoise_fn, state, grid, silence, start=start, stop=stop, eta=0.0)


def dpm2_ancestral(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    eta: Scalar = 1.0,
) -> State:
    """`dpm2` to below the next level, and noise from there up to it (k-diffusion); first order with its noise."""

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
        d = _slope(denoise_fn, x, step.sigma)

        def to_end(x: Latent) -> Latent:
            return x - step.sigma * d

        def through_middle(x: Latent) -> Latent:
            middle = jnp.sqrt(step.sigma * s_down)
            d_middle = _slope(denoise_fn, x + (middle - step.sigma) * d, middle)
            return x + (s_down - step.sigma) * d_middle + s_up * noise_fn(step.i)

        return jax.lax.cond(step.sigma_next == 0, to_end, through_middle, x), past

    return walk(step_fn, state, grid, start, stop)


def _slope(denoise_fn: DenoiseFn, x: Latent, sigma: Sigma) -> Latent:
    return (x - denoise_fn(x, sigma)) / sigma
