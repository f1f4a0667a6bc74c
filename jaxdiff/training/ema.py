"""Averages of the parameters over a run."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.config import EMAConfig

# The number of the step just taken, from 1 -> what is kept of the average so far.
Decay = Callable[[Int[Array, ""]], Float[Array, ""]]


def profiles(config: EMAConfig) -> dict[str, Decay]:
    """The averages that a run keeps, by the names they have in its state."""
    if config.profile == "constant":
        return {f"{config.decay:g}": partial(constant, decay=config.decay)}
    return {f"{width:.3f}": partial(power, gamma=exponent(width)) for width in config.widths}


def constant(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """`decay`, but a young average forgets faster, so that early evaluations do not show the random start."""
    return jnp.minimum(decay, step / (9 + step))


def power(step: Int[Array, ""], gamma: float) -> Float[Array, ""]:
    """(1 - 1/t)^(gamma + 1), which weighs step s of t by s^gamma (Karras et al. 2024, eq. 1)."""
    return (1 - 1 / step) ** (gamma + 1)


def exponent(width: float) -> float:
    """The gamma of the power profile whose standard deviation is `width` times its length.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, eq. 2), a cubic in gamma.
    """
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
