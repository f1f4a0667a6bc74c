"""One-step samplers of dx/dsigma = (x - x_0(x, sigma)) / sigma (Karras et al. 2022, eq. 4), and their random kin."""

import jax
import jax.numpy as jnp

from jaxdiff.sampling.loop import (
    History,
    NoiseFn,
    Scalar,
    Step,
    StepFn,
    ancestral,
    clipped,
    no_noise,
    to_eps,
    unless_last,
)
from jaxdiff.types import DenoiseFn, Latent, Sigma


def euler(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """Euler's method (Karras et al. 2022, algorithm 1, without its correction): first order, DDIM's step at eta 0.

    At flow matching's levels it is the Euler step of Lipman et al. 2023: that x_0 and eps stay as they are holds on the
    straight line, too.
    """
    return euler_ancestral(denoise_fn, no_noise, eta=0.0)


def euler_ancestral(denoise_fn: DenoiseFn, noise_fn: NoiseFn, eta: Scalar = 1.0) -> StepFn:
    """Euler's method to s_down, below the next level, and noise from there up to it (k-diffusion); first order."""

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
        x_0 = denoise_fn(x, step.sigma)
        return x_0 + s_down / step.sigma * (x - x_0) + s_up * noise_fn(step.index), history

    return step_fn


def heun(denoise_fn: DenoiseFn, noise_fn: NoiseFn, clip: float | None = None) -> StepFn:
    """Heun's method, without churn (Karras et al. 2022, algorithm 1): second order, two calls a step."""
    denoise_fn = clipped(denoise_fn, clip)

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        width = step.sigma_next - step.sigma
        d = to_eps(x, denoise_fn(x, step.sigma), step.sigma)

        def corrected(x_next: Latent) -> Latent:
            d_next = to_eps(x_next, denoise_fn(x_next, step.sigma_next), step.sigma_next)
            return x + width / 2 * (d + d_next)

        return unless_last(step, corrected, x + width * d), history

    return step_fn


def flow_heun(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """Heun's method along the straight line y = (1 - t) x_0 + t eps, dy/dt = eps - x_0 (Liu et al. 2023, section 2.1).

    Here y = x / (1 + sigma) and t = sigma / (1 + sigma). Second order, two calls a step; the error differs from
    `heun`'s, since the coordinate does.
    """

    def velocity(y: Latent, sigma: Sigma) -> Latent:
        x = y * (1 + sigma)
        x_0 = denoise_fn(x, sigma)
        return to_eps(x, x_0, sigma) - x_0

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        y, width = x / (1 + step.sigma), 1 / (1 + step.sigma) - 1 / (1 + step.sigma_next)
        v = velocity(y, step.sigma)

        def corrected(y_next: Latent) -> Latent:
            return y + width / 2 * (v + velocity(y_next, step.sigma_next))

        return unless_last(step, corrected, y + width * v) * (1 + step.sigma_next), history

    return step_fn


def dpm2(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """DPM-Solver-2: the midpoint method in sigma, with the middle of log sigma (Lu et al. 2022, algorithm 1, in the
    form of Karras et al. 2022, algorithm 2, without churn); second order, two calls a step."""
    return dpm2_ancestral(denoise_fn, no_noise, eta=0.0)


def dpm2_ancestral(denoise_fn: DenoiseFn, noise_fn: NoiseFn, eta: Scalar = 1.0) -> StepFn:
    """`dpm2` to s_down, below the next level, and noise from there up to it (k-diffusion); first order with noise."""

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
        d = to_eps(x, denoise_fn(x, step.sigma), step.sigma)

        def to_end(x: Latent) -> Latent:
            return x - step.sigma * d

        def through_middle(x: Latent) -> Latent:
            middle = jnp.sqrt(step.sigma * s_down)
            x_middle = x + (middle - step.sigma) * d
            d_middle = to_eps(x_middle, denoise_fn(x_middle, middle), middle)
            return x + (s_down - step.sigma) * d_middle + s_up * noise_fn(step.index)

        return jax.lax.cond(step.sigma_next == 0, to_end, through_middle, x), history

    return step_fn
