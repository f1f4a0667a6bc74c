"""Guidance: functions from `DenoiseFn` to `DenoiseFn`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.types import DenoiseFn, Latent, Sigma

Scale = Float[Array, ""] | float


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


def _extrapolate(x_c: Latent, x_u: Latent, scale: Scale) -> Latent:
    return x_c + (scale - 1) * (x_c - x_u)  # written so that scale 1 is exact
