"""How much each noise level counts in the loss.

Papers weigh the error of different outputs. Here a weight is meant for the error in x_0. It is divided by
`Prediction.error_ratio`, so that the objective is the same whatever the network predicts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.prediction import Prediction

Levels = Float[Array, "*b"]


def unweighted(sigma: Levels, prediction: Prediction) -> Levels:
    """The plain error of the output counts alike at every level (Ho et al. 2020, eq. 14)."""
    return jnp.ones_like(sigma)


def min_snr(sigma: Levels, prediction: Prediction, gamma: float = 5.0) -> Levels:
    """min(SNR, gamma) on x_0 (Hang et al. 2023, section 3.4); the signal-to-noise ratio is 1 / sigma^2."""
    return jnp.minimum(sigma**-2, gamma) / prediction.error_ratio(sigma)


def debiased(sigma: Levels, prediction: Prediction) -> Levels:
    """1 / sqrt(SNR) on epsilon, so sqrt(SNR) on x_0 (Yu et al. 2023, debiased estimation)."""
    return 1 / sigma / prediction.error_ratio(sigma)


def edm(sigma: Levels, prediction: Prediction, sigma_data: float = 1.0) -> Levels:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0 (Karras et al. 2022, table 1).

    For v and `sigma_data` 1, which is the spread of scaled latents, the weight is 1.
    """
    return (sigma**-2 + sigma_data**-2) / prediction.error_ratio(sigma)
