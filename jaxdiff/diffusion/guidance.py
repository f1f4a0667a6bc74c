"""Guidance: functions from `DenoiseFn` to `DenoiseFn`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.types import DenoiseFn, Latent, Sigma

Scale = Float[Array, ""] | float


class Guidance(NamedTuple):
    """How hard to follow the prompt, and at which noise levels."""

    scale: Scale
    """That of `classifier_free`."""
    low: Scale
    """The lowest and the highest sigma that are guided; see `within`."""
    high: Scale


def classifier_free(cond: DenoiseFn, uncond: DenoiseFn, scale: Scale) -> DenoiseFn:
    """Extrapolates from `uncond` through `cond` (Ho & Salimans 2022, eq. 6); scale 1 is `cond` itself, 0 `uncond`."""

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        return _extrapolate(cond(x, sigma), uncond(x, sigma), scale)

    return denoise


def classifier_free_joint(both: DenoiseFn, scale: Scale) -> DenoiseFn:
    """`classifier_free` in one network call: `both` answers for [2, h, w, c], the unconditional half first."""

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        x_u, x_c = both(jnp.stack([x, x]), sigma)
        return _extrapolate(x_c, x_u, scale)

    return denoise


def within(inside: DenoiseFn, outside: DenoiseFn, low: Scale, high: Scale) -> DenoiseFn:
    """`inside` at low <= sigma <= high, `outside` elsewhere: guidance where it helps (Kynkäänniemi et al. 2024, eq. 5).

    Only one of them is computed, also under `vmap` over images that share their level.
    """

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        return jax.lax.cond((low <= sigma) & (sigma <= high), inside, outside, x, sigma)

    return denoise


def _extrapolate(x_c: Latent, x_u: Latent, scale: Scale) -> Latent:
    return x_c + (scale - 1) * (x_c - x_u)  # written so that scale 1 is exact
