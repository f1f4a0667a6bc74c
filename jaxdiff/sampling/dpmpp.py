"""Exponential integrators of the guess of x_0 in h = log(sigma / sigma_next): the DPM-Solver++ family.

Variation of constants makes dx = (1 + eta) (x - D) dsigma/sigma + noise, in one step,

    x' = r x + (1 - r) D + noise sigma' sqrt(1 - (sigma'/sigma)^(2 eta)),   r = (sigma'/sigma)^(1 + eta),

exact for a D that stays (Lu et al. 2022, DPM-Solver++, eq. 8 and 19; eta 0 is the probability flow, 1 the reverse SDE).
The samplers differ in what they put for a D that does not. All take what `ddim` takes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.walk import (
    Index,
    NoiseFn,
    Past,
    Scalar,
    State,
    Step,
    ancestral,
    combine,
    remember,
    silence,
    unless_last,
    walk,
)
from jaxdiff.types import DenoiseFn, Latent

FEW = 15  # with fewer steps, the last ones lower their order, as diffusers does


def dpmpp_2m(denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index) -> State:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one call a step."""
    return dpmpp_2m_sde(denoise_fn, state, grid, silence, start=start, stop=stop, eta=0.0)


def dpmpp_2m_sde(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    eta: Scalar = 1.0,
) -> State:
    """SDE-DPM-Solver++(2M), in its midpoint form (Lu et al. 2022, appendix B.3): `dpmpp_2m` with noise."""

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        D = denoise_fn(x, step.sigma)
        return _integrate(_second(step, eta, _order(step, 2)), x, D, past, step, eta, noise_fn), remember(past, D)

    return walk(step_fn, state, grid, start, stop)


def dpmpp_3m_sde(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    eta: Scalar = 1.0,
) -> State:
    """SDE-DPM-Solver++(3M): a parabola through the last three guesses of x_0 (k-diffusion's sample_dpmpp_3m_sde).

    The published weights are kept. They take d2, half the parabola's bend, for the whole, and so the order is two, with
    a smaller error than `dpmpp_2m_sde`. diffusers 0.42 has another sign in the bend's weight (-1/2 for +1/2 in phi_3),
    which makes it first order; that is not kept.
    """

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        D = denoise_fn(x, step.sigma)
        order = _order(step, 3)
        weights = jnp.where(order == 3, _third(step, eta), _second(step, eta, order))
        return _integrate(weights, x, D, past, step, eta, noise_fn), remember(past, D)

    return walk(step_fn, state, grid, start, stop)


def dpmpp_sde(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    eta: Scalar = 1.0,
) -> State:
    """DPM-Solver++ (SDE), one step with a middle (k-diffusion's sample_dpmpp_sde, r = 1/2); two calls a step.

    The noise up to the middle is a part of the whole step's, as on a Brownian path; step i takes noises 2 i and
    2 i + 1.
    """

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        D = denoise_fn(x, step.sigma)

        def through_middle(x_0: Latent) -> Latent:
            middle = jnp.sqrt(step.sigma * step.sigma_next)
            first, second = noise_fn(2 * step.i), noise_fn(2 * step.i + 1)
            share = (step.sigma - middle) / (step.sigma - step.sigma_next)
            whole = jnp.sqrt(share) * first + jnp.sqrt(1 - share) * second
            s_down, s_up = ancestral(step.sigma, middle, eta)
            x_middle = x_0 + s_down / step.sigma * (x - x_0) + s_up * first
            D_middle = denoise_fn(x_middle, middle)
            s_down, s_up = ancestral(step.sigma, step.sigma_next, eta)
            return D_middle + s_down / step.sigma * (x - D_middle) + s_up * whole

        return unless_last(step, through_middle, D), past

    return walk(step_fn, state, grid, start, stop)


def unipc(denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index) -> State:
    """UniPC-2 with B(h) = exp(-h) - 1 (Zhao et al. 2023, algorithms 5 and 7): third order, one call a step.

    Each call first corrects the step that led to it, and then serves the next; the predictor is `dpmpp_2m`'s step.
    """

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        D, x_last = denoise_fn(x, step.sigma), past[2]
        corrected = step.sigma / step.before[0] * x_last + combine(_corrector(step), D, past)
        x = jnp.where(step.taken > 0, corrected, x)
        order = jnp.minimum(jnp.minimum(2, step.taken + 1), step.left)
        x_next = _integrate(_second(step, 0.0, order), x, D, past, step, 0.0, silence)
        return x_next, remember(past, D, past[0], x)

    return walk(step_fn, state, grid, start, stop)


def _order(step: Step, most: int) -> Int[Array, ""]:
    """How many guesses of x_0 to use: as many as there are, fewer in the last steps."""
    few = step.of < FEW
    last = (step.left == 1) & (few | (step.sigma_next == 0))
    allowed = jnp.where(last, 1, jnp.where((step.left == 2) & few, 2, most))
    return jnp.minimum(jnp.minimum(most, step.taken + 1), allowed)


def _integrate(
    weights: Float[Array, " n"], x: Latent, D: Latent, past: Past, step: Step, eta: Scalar, noise_fn: NoiseFn
) -> Latent:
    """r x, the weighted guesses of x_0, and the noise."""
    ratio = step.sigma_next / step.sigma
    s_up = step.sigma_next * jnp.sqrt(jnp.maximum(1 - ratio ** (2 * eta), 0))
    return ratio ** (1 + eta) * x + combine(weights, D, past) + s_up * noise_fn(step.i)


def _second(step: Step, eta: Scalar, order: Int[Array, ""]) -> Float[Array, " 3"]:
    """Weights of the last guesses of x_0 where the newest two make a line, read half a step ahead."""
    h, h_1 = jnp.log(step.sigma / step.sigma_next), jnp.log(step.before[0] / step.sigma)
    ahead = jnp.where(order > 1, h / h_1 / 2, 0)
    return _first(step, eta) * jnp.stack([1 + ahead, -ahead, jnp.zeros(())])


def _third(step: Step, eta: Scalar) -> Float[Array, " 3"]:
    """Weights of the last three guesses of x_0 on a parabola, in k-diffusion's terms: phi_2 d1 - phi_3 d2."""
    h = jnp.log(step.sigma / step.sigma_next)
    r_0, r_1 = jnp.log(step.before[0] / step.sigma) / h, jnp.log(step.before[1] / step.before[0]) / h
    phi_2 = 1 - _first(step, eta) / ((1 + eta) * h)
    phi_3 = phi_2 / ((1 + eta) * h) - 0.5
    slope_0 = (phi_2 * (1 + r_0 / (r_0 + r_1)) - phi_3 / (r_0 + r_1)) / r_0
    slope_1 = (phi_3 / (r_0 + r_1) - phi_2 * r_0 / (r_0 + r_1)) / r_1
    return jnp.stack([_first(step, eta) + slope_0, slope_1 - slope_0, -slope_1])


def _first(step: Step, eta: Scalar) -> Float[Array, ""]:
    """1 - r."""
    return -jnp.expm1(-(1 + eta) * jnp.log(step.sigma / step.sigma_next))


def _corrector(step: Step) -> Float[Array, " 3"]:
    """Weights of the guesses of x_0 at this level and the two before, for the step that led here (eq. 8 and 9)."""
    h = jnp.log(step.before[0] / step.sigma)
    B = jnp.expm1(-h)
    r = -jnp.log(step.before[1] / step.before[0]) / h
    phi_1 = -B / h - 1
    phi_2 = -phi_1 / h - 0.5
    b_1, b_2 = phi_1 / B, 2 * phi_2 / B
    second = step.taken > 1
    rho_1 = jnp.where(second, (b_1 - b_2) / (1 - r), 0)
    rho_2 = jnp.where(second, b_1 - rho_1, 0.5)
    older = jnp.where(second, rho_1 / r, 0)
    return -B * jnp.stack([rho_2, 1 - older - rho_2, older])
