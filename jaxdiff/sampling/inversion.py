"""From a clean latent up to the noise that it would be drawn from, and a sampler that can be undone exactly.

`ddim_inversion` and `edict_inversion` are samplers on a grid turned round (`backwards`): they start at a picture.
"""

import jax.numpy as jnp
import numpy as np

from jaxdiff.sampling.grids import Grid
from jaxdiff.sampling.walk import Index, NoiseFn, Past, State, Step, walk
from jaxdiff.types import DenoiseFn, Latent, Sigma

MIX = 0.93
"""How much of each of EDICT's two latents is its own; the paper's p."""


def backwards(grid: Grid, steps: int) -> Grid:
    """The grid's first `steps`, the last one first, each from where it ends to where it begins."""
    sigmas, sigmas_next = np.array(grid.sigmas), np.array(grid.sigmas_next)
    sigmas[:steps], sigmas_next[:steps] = np.copy(grid.sigmas_next[:steps][::-1]), np.copy(grid.sigmas[:steps][::-1])
    return Grid(sigmas, sigmas_next)


def ddim_inversion(
    denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index
) -> State:
    """DDIM's steps taken backwards as if the noise were the same at both ends of a step (Song et al. 2021, section
    4.3): near the noise of the picture, the nearer the more steps."""

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        # The upper level's guess, for the lower may be 0, where the model says nothing; of x at that level's variance.
        above = x * jnp.sqrt((1 + step.sigma_next**2) / (1 + step.sigma**2))
        return x + (step.sigma_next - step.sigma) * _eps(denoise_fn, above, step.sigma_next), past

    return walk(step_fn, state, grid, start, stop)


def edict(denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index) -> State:
    """DDIM of two latents that take turns in telling the noise to each other (Wallace et al. 2023, EDICT, eq. 14):
    `edict_inversion` undoes each step exactly. Two calls a step; the second latent is the past's first."""

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        width = step.sigma_next - step.sigma
        y = _second(x, past, step)
        x = x + width * _eps(denoise_fn, y, step.sigma)
        y = y + width * _eps(denoise_fn, x, step.sigma)
        x = MIX * x + (1 - MIX) * y
        y = MIX * y + (1 - MIX) * x
        return x, _keep(y, past, step)

    return walk(step_fn, state, grid, start, stop)


def edict_inversion(
    denoise_fn: DenoiseFn, state: State, grid: Grid, noise_fn: NoiseFn, *, start: Index, stop: Index
) -> State:
    """`edict` undone (Wallace et al. 2023, eq. 15), on a grid that is turned round."""

    def step_fn(x: Latent, past: Past, step: Step) -> tuple[Latent, Past]:
        width = step.sigma - step.sigma_next
        y = _second(x, past, step)
        y = (y - (1 - MIX) * x) / MIX
        x = (x - (1 - MIX) * y) / MIX
        y = y - width * _eps(denoise_fn, x, step.sigma_next)
        x = x - width * _eps(denoise_fn, y, step.sigma_next)
        return x, _keep(y, past, step)

    return walk(step_fn, state, grid, start, stop)


def _eps(denoise_fn: DenoiseFn, x: Latent, sigma: Sigma) -> Latent:
    return (x - denoise_fn(x, sigma)) / sigma


def _second(x: Latent, past: Past, step: Step) -> Latent:
    """The second latent: a walk begins with both alike, unless it goes on from an inversion."""
    kept = past[0] * jnp.sqrt(1 + step.sigma**2)
    return jnp.where((step.taken == 0) & (past[0] == 0).all(), x, kept)


def _keep(y: Latent, past: Past, step: Step) -> Past:
    """Scaled as `State.x` is, so that a walk back finds it."""
    return past.at[0].set(y / jnp.sqrt(1 + step.sigma_next**2))
