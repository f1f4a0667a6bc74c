"""Which noise level each sample is trained at: uniform, logit-normal, or drawn by how large the loss has been there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.types import Key

# A sample's key -> its level, from 0 to steps - 1, and the weight that keeps the expected loss that of uniform levels.
DrawFn = Callable[[Key], tuple[Int[Array, ""], Float[Array, ""]]]

HISTORY = 10  # losses remembered for each level (Nichol & Dhariwal 2021, section 3.3)
EVEN_SHARE = 1e-3  # of the draws, so that no level is forgotten


def uniform(steps: int) -> DrawFn:
    """All levels alike (Ho et al. 2020, algorithm 1)."""
    return lambda key: (jax.random.randint(key, (), 0, steps), jnp.ones(()))


def logit_normal(steps: int, mean: float = 0.0, std: float = 1.0) -> DrawFn:
    """Mostly in the middle: the sigmoid of a normal draw, as a share of the way to noise (Esser et al. 2024, eq. 19).

    The density is part of the objective, so weights are 1.
    """

    def draw(key: Key) -> tuple[Int[Array, ""], Float[Array, ""]]:
        share = jax.nn.sigmoid(mean + std * jax.random.normal(key))
        return jnp.minimum((share * steps).astype(jnp.int32), steps - 1), jnp.ones(())

    return draw


# Importance sampling --------------------------------------------------------------------------------------------------

# "losses" [steps, HISTORY]: the last ones of each level; "seen" [steps]: how many there have been.
History = dict[str, Array]


def history(steps: int) -> History:
    """Nothing seen yet."""
    return {"losses": jnp.zeros((steps, HISTORY), jnp.bfloat16), "seen": jnp.zeros(steps, jnp.int32)}


def probabilities(past: History) -> Float[Array, " steps"]:
    """p_t in proportion to sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, eq. 18); even until each level has its history."""
    losses = past["losses"].astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(losses), axis=1))
    even = jnp.full(len(rms), 1 / len(rms))
    p = (1 - EVEN_SHARE) * rms / jnp.maximum(rms.sum(), jnp.finfo(jnp.float32).tiny) + EVEN_SHARE * even
    return jnp.where((past["seen"] >= HISTORY).all() & (rms.sum() > 0), p, even)


def importance(past: History) -> DrawFn:
    """Levels where the loss is large and varied come more often; weights 1 / (T p_t) take it back (eq. 18)."""
    p = probabilities(past)
    edges = jnp.cumsum(p)

    def draw(key: Key) -> tuple[Int[Array, ""], Float[Array, ""]]:
        place = jax.random.uniform(key) * edges[-1]
        level = jnp.minimum(jnp.searchsorted(edges, place, side="right"), len(p) - 1)
        return level, 1 / (len(p) * p[level])

    return draw


def remember(past: History, level: Int[Array, " b"], loss: Float[Array, " b"]) -> History:
    """The history with a batch of losses in place of each level's oldest, in the batch's order.

    Losses are kept to 8 bits, so that what rounding another device mesh brings into them is lost again, and the next
    draws are the same there.
    """
    steps, b = len(past["seen"]), len(level)
    order = jnp.argsort(level, stable=True)
    level, loss = level[order], loss[order]
    first, end = jnp.searchsorted(level, level, side="left"), jnp.searchsorted(level, level, side="right")
    slot = (past["seen"][level] + jnp.arange(b) - first) % HISTORY
    fits = end - jnp.arange(b) <= HISTORY  # of more losses of one level than are kept, the last ones
    losses = past["losses"].at[jnp.where(fits, level, steps), slot].set(loss.astype(jnp.bfloat16), mode="drop")
    return {"losses": losses, "seen": past["seen"].at[level].add(1)}
