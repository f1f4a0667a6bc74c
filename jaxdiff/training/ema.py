"""Averages of the parameters over a run."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from jaxdiff.config import EMAConfig
from jaxdiff.types import Params

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
    """(1 - 1/t)^(gamma + 1), which weighs step s of t by s^gamma (Karras et al. 2024, section 3.1)."""
    return (1 - 1 / step) ** (gamma + 1)


def exponent(width: float) -> float:
    """The gamma of the power profile whose standard deviation is `width` times its length.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, section 3.1), a cubic in gamma.
    """
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


# After the run --------------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """A stored power average."""

    step: int
    width: float


def posthoc(snapshots: Sequence[Snapshot], width: float, step: int) -> Float64[np.ndarray, " n"]:
    """What each stored average counts in one of another width, or of an earlier step (Karras et al. 2024, section 3.2).

    The combination's profile is the nearest to the wanted one, in least squares, that the stored ones make: with their
    inner products A and those with the wanted profile b, it solves A x = b; x is then brought to the sum 1.

    Raises:
        ValueError: where no snapshot is as old as `step`, or the profile's own width is out of range.
    """
    if not any(s.step >= step for s in snapshots):
        raise ValueError(f"No average of step {step} or later is stored; the last is of step "
                         f"{max((s.step for s in snapshots), default=0)}.")  # fmt: skip
    if not 0 < width < 0.28:
        raise ValueError(f"width is {width}; it must lie between 0 and 0.28, which is nearly a plain mean.")
    steps = np.array([s.step for s in snapshots], float)
    gammas = np.array([exponent(s.width) for s in snapshots])
    products = inner_product(steps[:, None], gammas[:, None], steps, gammas)
    wanted = inner_product(steps, gammas, float(step), exponent(width))
    scale = 1 / np.sqrt(np.diag(products))  # profiles of early steps are far taller
    solution, *_ = np.linalg.lstsq(products * scale[:, None] * scale, wanted * scale, rcond=1e-12)
    shares = solution * scale
    return shares / shares.sum()


def inner_product(step_a: Any, gamma_a: Any, step_b: Any, gamma_b: Any) -> Any:
    """The integral of the product of two profiles (gamma + 1) / t (s / t)^gamma, each on s in [0, t]."""
    shorter = np.minimum(step_a, step_b)
    tops = (shorter / step_a) ** gamma_a * (shorter / step_b) ** gamma_b
    return (gamma_a + 1) * (gamma_b + 1) * shorter * tops / (step_a * step_b * (gamma_a + gamma_b + 1))


def combine(averages: Iterable[Params], shares: Float64[np.ndarray, " n"]) -> Params:
    """The sum of the trees, each times its share; they are read one after another."""
    total: Any = None
    for tree, share in zip(averages, shares, strict=True):
        part = jax.tree.map(lambda leaf, share=share: np.float32(share) * np.asarray(leaf, np.float32), tree)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total
