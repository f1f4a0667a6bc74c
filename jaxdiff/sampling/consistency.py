"""Few-step samplers of distilled models: straight to a low level, and with fresh noise up again."""

import jax.numpy as jnp

from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.walk import Index, NoiseFn, Past, State, Step, clipped, walk
from jaxdiff.types import DenoiseFn, Latent


def lcm(
    denoise_fn: DenoiseFn,
    state: State,
    grid: Grid,
    noise_fn: NoiseFn,
    *,
    start: Index,
    stop: Index,
    clip: float | None = None,
) -> State:
    """Latent consistency models (Luo et al. 2023, algorithm 3): `tcd` on a grid whose steps all end at sigma 0.

    The boundary condition's c_skip and c_out are left at 0 and 1, from which they differ by less than 1e-5 at all the
    levels that such a model was distilled at.
    """
    return tcd(clipped(denoise_fn, clip), state, grid, noise_fn, start=start, stop=stop)


def tcd(denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index) -> State:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, strategic stochastic sampling).

    Step i reads level `sigmas[i]` and leaves at `sigmas_next[i]`, from where the next one climbs to `sigmas[i + 1]`
    with noise i. How far down each step goes is the paper's gamma, which `tcd_grid` takes.
    """

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        low = grid.sigmas_next[jnp.maximum(step.i - 1, 0)]
        # The state came at unit variance for `low`, and `walk` took it for this step's own level.
        x_low = x * jnp.sqrt((1 + low**2) / (1 + step.sigma**2))
        # A product, since a difference of squares that are equal need not come out as 0.
        climb = jnp.sqrt(jnp.maximum((step.sigma - low) * (step.sigma + low), 0))
        climbed = x_low + climb * noise_fn(step.i - 1)
        x = jnp.where(step.taken > 0, climbed, x)
        x_0 = denoise_fn(x, step.sigma)
        return x_0 + step.sigma_next / step.sigma * (x - x_0), past

    grid = Grid(*map(jnp.asarray, grid))
    return walk(step_fn, state, grid, start, stop)
