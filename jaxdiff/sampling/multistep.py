"""Adams-Bashforth on the noise eps = (x - x_0) / sigma: x' = x + the integral of eps over sigma, from the last few.

The samplers differ in the coordinate in which eps is a polynomial. All call the denoiser once a step.
"""

import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from jaxdiff.sampling.dpmpp import FEW
from jaxdiff.sampling.loop import History, NoiseFn, Step, StepFn, push, to_eps, weighted_sum
from jaxdiff.types import DenoiseFn, Latent


def lms(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """A cubic in sigma through the last four eps (k-diffusion's sample_lms): fourth order once it has them."""

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        eps = to_eps(x, denoise_fn(x, step.sigma), step.sigma)
        return x + weighted_sum(_cubic(step), eps, history), push(history, eps)

    return step_fn


def deis(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """A line in log sigma through the last two eps, DEIS's rho-AB1 (Zhang & Chen 2023, eq. 15): second order."""

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        eps = to_eps(x, denoise_fn(x, step.sigma), step.sigma)
        r = step.sigma_next / step.sigma
        bend = step.sigma * (xlogy(r, r) - r + 1) / jnp.log(step.sigmas_before[0] / step.sigma)
        last = (step.steps_left == 1) & ((step.steps < FEW) | (step.sigma_next == 0))
        bend = jnp.where((step.taken > 0) & ~last, bend, 0)
        weights = jnp.stack([step.sigma_next - step.sigma - bend, bend])
        return x + weighted_sum(weights, eps, history), push(history, eps)

    return step_fn


def pndm(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """Pseudo linear multistep, PLMS (Liu et al. 2022, eq. 11 and 12): a cubic in the training step, second order.

    At the levels of `sigmas.PNDM` the second step repeats the first with the mean of the eps at its two ends.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        eps = to_eps(x, denoise_fn(x, step.sigma), step.sigma)
        from_top = step.index == step.taken  # a loop that starts at a later step than 0 has no step that is repeated
        again = from_top & (step.taken == 1)
        x = jnp.where(again, history[3], x)
        sigma = jnp.where(again, step.sigmas_before[0], step.sigma)
        row = step.taken + (~from_top & (step.taken > 0)).astype(int)
        weights = jnp.array(ADAMS)[jnp.minimum(row, len(ADAMS) - 1)]
        x_next = x + (step.sigma_next - sigma) * weighted_sum(weights, eps, history)
        kept = jnp.where(again, history[:3], push(history, eps)[:3])
        return x_next, push(history, *kept, x)

    return step_fn


# Of eps now and before, for PLMS's steps in turn: Euler's, the trapezium, and Adams-Bashforth of orders 2, 3 and 4.
ADAMS = (
    (1, 0, 0, 0),
    (1 / 2, 1 / 2, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _cubic(step: Step) -> Float[Array, " 4"]:
    """Integrals of Lagrange's polynomials over the step; two Gauss points are exact for cubics."""
    nodes = jnp.concatenate([step.sigma[None], step.sigmas_before[:3]])
    there = jnp.arange(4) <= step.taken
    half = (step.sigma_next - step.sigma) / 2
    points = step.sigma + half + half * jnp.array([-1.0, 1.0]) / jnp.sqrt(3)
    others = nodes[None]
    factors = (points[:, None, None] - others[None]) / (nodes[:, None] - others)[None]  # point, polynomial, other nodes
    factors = jnp.where(jnp.eye(4, dtype=bool) | ~there[None], 1, factors)
    return jnp.where(there, half * factors.prod(2).sum(0), 0)
