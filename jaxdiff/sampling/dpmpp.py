"""Exponential integrators of the guess of x_0 in h = log(sigma / sigma_next): the DPM-Solver++ family.

Variation of constants turns dx = (1 + eta) (x - x_0) dsigma/sigma + noise into one step,

    x' = r x + (1 - r) x_0 + noise sigma' sqrt(1 - (sigma'/sigma)^(2 eta)),   r = (sigma'/sigma)^(1 + eta),

which is exact for a guess x_0 that does not change (Lu et al. 2022, DPM-Solver++, eq. 8 and 19; eta 0 is the
probability flow, 1 the reverse SDE). The samplers differ in what they put for a guess that does.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.sampling.loop import (
    History,
    NoiseFn,
    Scalar,
    Step,
    StepFn,
    ancestral,
    no_noise,
    push,
    unless_last,
    weighted_sum,
)
from jaxdiff.types import DenoiseFn, Latent

FEW = 15  # with fewer steps, the last ones lower their order, as in diffusers


def dpmpp_2m(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one call a step."""
    return dpmpp_2m_sde(denoise_fn, no_noise, eta=0.0)


def dpmpp_2m_sde(denoise_fn: DenoiseFn, noise_fn: NoiseFn, eta: Scalar = 1.0) -> StepFn:
    """SDE-DPM-Solver++(2M), in its midpoint form (Lu et al. 2022, appendix B.3): `dpmpp_2m` with noise."""

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        x_0 = denoise_fn(x, step.sigma)
        weights = _second(step, eta, _order(step, 2))
        return _integrate(weights, x, x_0, history, step, eta, noise_fn), push(history, x_0)

    return step_fn


def dpmpp_3m_sde(denoise_fn: DenoiseFn, noise_fn: NoiseFn, eta: Scalar = 1.0) -> StepFn:
    """SDE-DPM-Solver++(3M): a parabola through the last three guesses of x_0 (k-diffusion's sample_dpmpp_3m_sde).

    The weights are the published ones. They take d2, half the parabola's bend, for the whole, and so the order is two,
    with a smaller error than `dpmpp_2m_sde`. diffusers 0.42 has another sign in the bend's weight (-1/2 for +1/2 in
    phi_3), which makes it first order; that is not followed.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        x_0 = denoise_fn(x, step.sigma)
        order = _order(step, 3)
        weights = jnp.where(order == 3, _third(step, eta), _second(step, eta, order))
        return _integrate(weights, x, x_0, history, step, eta, noise_fn), push(history, x_0)

    return step_fn


def dpmpp_sde(denoise_fn: DenoiseFn, noise_fn: NoiseFn, eta: Scalar = 1.0) -> StepFn:
    """DPM-Solver++ (SDE), one step with a middle (k-diffusion's sample_dpmpp_sde, r = 1/2); two calls a step.

    The noise up to the middle is a part of the whole step's, as on a Brownian path; step i takes noises 2 i and
    2 i + 1.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        x_0 = denoise_fn(x, step.sigma)

        def through_middle(x_0: Latent) -> Latent:
            middle = jnp.sqrt(step.sigma * step.sigma_next)
            first, second = noise_fn(2 * step.index), noise_fn(2 * step.index + 1)
            share = (step.sigma - middle) / (step.sigma - step.sigma_next)
            whole = jnp.sqrt(share) * first + jnp.sqrt(1 - share) * second
            s_down, s_up = ancestral(step.sigma, middle, eta)
            x_middle = x_0 + s_down / step.sigma * (x - x_0) + s_up * first
            x_0 = denoise_fn(x_middle, middle)
            s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
            return x_0 + s_down / step.sigma * (x - x_0) + s_up * whole

        return unless_last(step, through_middle, x_0), history

    return step_fn


def unipc(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """UniPC-2 with B(h) = exp(-h) - 1 (Zhao et al. 2023, algorithms 5 and 7): third order, one call a step.

    Each call first corrects the step that led to it and then serves the next; the predictor is `dpmpp_2m`'s step.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        x_0, x_before = denoise_fn(x, step.sigma), history[2]
        corrected = step.sigma / step.sigmas_before[0] * x_before + weighted_sum(_corrector(step), x_0, history)
        x = jnp.where(step.taken > 0, corrected, x)
        order = jnp.minimum(jnp.minimum(2, step.taken + 1), step.steps_left)
        x_next = _integrate(_second(step, 0.0, order), x, x_0, history, step, 0.0, no_noise)
        return x_next, push(history, x_0, history[0], x)

    return step_fn


def _order(step: Step, most: int) -> Int[Array, ""]:
    """How many guesses of x_0 to use: as many as there are, fewer in the last steps."""
    few = step.steps < FEW
    last = (step.steps_left == 1) & (few | (step.sigma_next == 0))
    allowed = jnp.where(last, 1, jnp.where((step.steps_left == 2) & few, 2, most))
    return jnp.minimum(jnp.minimum(most, step.taken + 1), allowed)


def _integrate(
    weights: Float[Array, " n"], x: Latent, x_0: Latent, history: History, step: Step, eta: Scalar, noise_fn: NoiseFn
) -> Latent:
    """r x, the weighted guesses of x_0, and the noise."""
    ratio = step.sigma_next / step.sigma
    s_up = step.sigma_next * jnp.sqrt(jnp.maximum(1 - ratio ** (2 * eta), 0))
    return ratio ** (1 + eta) * x + weighted_sum(weights, x_0, history) + s_up * noise_fn(step.index)


def _second(step: Step, eta: Scalar, order: Int[Array, ""]) -> Float[Array, " 3"]:
    """Weights of the last guesses of x_0 where the newest two make a line, read half a step ahead."""
    h, h_1 = jnp.log(step.sigma / step.sigma_next), jnp.log(step.sigmas_before[0] / step.sigma)
    ahead = jnp.where(order > 1, h / h_1 / 2, 0)
    return _first(step, eta) * jnp.stack([1 + ahead, -ahead, jnp.zeros(())])


def _third(step: Step, eta: Scalar) -> Float[Array, " 3"]:
    """Weights of the last three guesses of x_0 on a parabola, in k-diffusion's terms: phi_2 d1 - phi_3 d2."""
    h = jnp.log(step.sigma / step.sigma_next)
    r_0 = jnp.log(step.sigmas_before[0] / step.sigma) / h
    r_1 = jnp.log(step.sigmas_before[1] / step.sigmas_before[0]) / h
    phi_2 = 1 - _first(step, eta) / ((1 + eta) * h)
    phi_3 = phi_2 / ((1 + eta) * h) - 0.5
    slope_0 = (phi_2 * (1 + r_0 / (r_0 + r_1)) - phi_3 / (r_0 + r_1)) / r_0
    slope_1 = (phi_3 / (r_0 + r_1) - phi_2 * r_0 / (r_0 + r_1)) / r_1
    return jnp.stack([_first(step, eta) + slope_0, slope_1 - slope_0, -slope_1])


def _first(step: Step, eta: Scalar) -> Float[Array, ""]:
    """1 - r, the weight of x_0 in a step of first order."""
    return -jnp.expm1(-(1 + eta) * jnp.log(step.sigma / step.sigma_next))


def _corrector(step: Step) -> Float[Array, " 3"]:
    """Weights of the guesses of x_0 at this level and the two before, for the step that led here (eq. 8 and 9)."""
    h = jnp.log(step.sigmas_before[0] / step.sigma)
    B = jnp.expm1(-h)
    r = -jnp.log(step.sigmas_before[1] / step.sigmas_before[0]) / h
    phi_1 = -B / h - 1
    phi_2 = -phi_1 / h - 0.5
    b_1, b_2 = phi_1 / B, 2 * phi_2 / B
    second = step.taken > 1
    rho_1 = jnp.where(second, (b_1 - b_2) / (1 - r), 0)
    rho_2 = jnp.where(second, b_1 - rho_1, 0.5)
    older = jnp.where(second, rho_1 / r, 0)
    return -B * jnp.stack([rho_2, 1 - older - rho_2, older])
