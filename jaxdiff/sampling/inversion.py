"""From a clean latent up to the noise that it would be drawn from, and a sampler that can be undone exactly.

`ddim_inversion` and `edict_inversion` are samplers at levels in reverse order (`backwards`): they start at an image.
"""

import jax.numpy as jnp
import numpy as np

from jaxdiff.sampling.loop import History, NoiseFn, Step, StepFn, to_eps
from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.types import DenoiseFn, Latent, Sigma

MIX = 0.93
"""How much of each of EDICT's two latents is its own; the paper's p."""


def backwards(sigmas: Sigmas, steps: int) -> Sigmas:
    """The first `steps` steps in reverse order, each from where it ends to where it starts."""
    up, up_next = np.array(sigmas.sigmas), np.array(sigmas.sigmas_next)
    up[:steps], up_next[:steps] = np.copy(sigmas.sigmas_next[:steps][::-1]), np.copy(sigmas.sigmas[:steps][::-1])
    return Sigmas(up, up_next)


def ddim_inversion(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """DDIM's steps backwards, as if the noise were the same at both ends of a step (Song et al. 2021, section 4.3).

    The result comes nearer to the noise of the image the more steps there are.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        # The denoiser is called at the upper level, since the lower may be 0, with x scaled to its variance.
        above = x * jnp.sqrt((1 + step.sigma_next**2) / (1 + step.sigma**2))
        return x + (step.sigma_next - step.sigma) * _eps(denoise_fn, above, step.sigma_next), history

    return step_fn


def edict(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """EDICT (Wallace et al. 2023, eq. 14): DDIM of two latents, each of which steps by the noise in the other.

    `edict_inversion` undoes each step exactly. Two calls a step; the history's first latent is the second latent.
    """

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        width = step.sigma_next - step.sigma
        y = _second(x, history, step)
        x = x + width * _eps(denoise_fn, y, step.sigma)
        y = y + width * _eps(denoise_fn, x, step.sigma)
        x = MIX * x + (1 - MIX) * y
        y = MIX * y + (1 - MIX) * x
        return x, _keep(y, history, step)

    return step_fn


def edict_inversion(denoise_fn: DenoiseFn, noise_fn: NoiseFn) -> StepFn:
    """`edict` undone (Wallace et al. 2023, eq. 15), at levels in reverse order."""

    def step_fn(x: Latent, history: History, step: Step) -> tuple[Latent, History]:
        width = step.sigma - step.sigma_next
        y = _second(x, history, step)
        y = (y - (1 - MIX) * x) / MIX
        x = (x - (1 - MIX) * y) / MIX
        y = y - width * _eps(denoise_fn, x, step.sigma_next)
        x = x - width * _eps(denoise_fn, y, step.sigma_next)
        return x, _keep(y, history, step)

    return step_fn


def _eps(denoise_fn: DenoiseFn, x: Latent, sigma: Sigma) -> Latent:
    return to_eps(x, denoise_fn(x, sigma), sigma)


def _second(x: Latent, history: History, step: Step) -> Latent:
    """The second latent: the same as the first before any step, but for a loop that goes on from an inversion."""
    kept = history[0] * jnp.sqrt(1 + step.sigma**2)
    return jnp.where((step.taken == 0) & (history[0] == 0).all(), x, kept)


def _keep(y: Latent, history: History, step: Step) -> History:
    """Keeps the second latent scaled as `State.x` is, so that a loop in the other direction can go on with it."""
    return history.at[0].set(y / jnp.sqrt(1 + step.sigma_next**2))
