"""Two networks against each other: losses on verdicts, the penalty that keeps a discriminator smooth, a fair weight.

A verdict is a number for each image, or for each patch of one, above 0 where it looks real.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Verdicts = Float[Array, "b *patches"]


class Losses(NamedTuple):
    """What each side makes small."""

    discriminator: Callable[[Verdicts, Verdicts], Float[Array, ""]]
    """(verdicts on real images, on made ones)"""
    generator: Callable[[Verdicts], Float[Array, ""]]
    """(verdicts on made images)"""


LOSSES = {
    # Lim & Ye 2017; halved as in Esser et al. 2021.
    "hinge": Losses(
        lambda real, made: 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + made).mean()),
        lambda made: -made.mean(),
    ),
    # Goodfellow et al. 2014, section 3, the generator's the other one there; the best verdict is log p(real) / p(made).
    "softplus": Losses(
        lambda real, made: jax.nn.softplus(-real).mean() + jax.nn.softplus(made).mean(),
        lambda made: jax.nn.softplus(-made).mean(),
    ),
}


def r1_penalty(
    discriminate: Callable[[Float[Array, "b *d"]], Verdicts], image: Float[Array, "b *d"]
) -> tuple[Float[Array, ""], Verdicts]:
    """The squared gradient of the verdicts at real images (Mescheder et al. 2018, eq. 9, without gamma / 2).

    It is a mean over images, and over the patches of each: |d(sum of verdicts)/d image|^2 / patches, which is the same
    for one patch as for many that do not overlap.

    Returns:
        The penalty, and the verdicts.
    """
    verdicts, pull = jax.vjp(discriminate, image)
    (gradient,) = pull(jnp.ones_like(verdicts))
    return jnp.square(gradient).sum() / verdicts.size, verdicts


def adaptive_weight(likeness: Float[Array, "*k"], adversary: Float[Array, "*k"]) -> Float[Array, ""]:
    """What brings the adversary's gradient to the size of the other's, at one kernel (Esser et al. 2021, eq. 7)."""
    size, other = (jnp.sqrt(jnp.square(gradient).sum()) for gradient in (likeness, adversary))
    return (size / (other + 1e-4)).clip(0, 1e4)


def with_gradient(value: Float[Array, ""], x: Float[Array, "*d"], gradient: Float[Array, "*d"]) -> Float[Array, ""]:
    """`value`, of which the gradient at `x` is known, so that it is pulled back from there once and for all."""
    along = (x * jax.lax.stop_gradient(gradient)).sum()
    return jax.lax.stop_gradient(value) + along - jax.lax.stop_gradient(along)
