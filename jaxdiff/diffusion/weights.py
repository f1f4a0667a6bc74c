"""How much each noise level counts in the loss.

Papers weigh the error of different outputs. Here a weight is meant for the error in x_0 and then divided by how much
larger the error of the network's own output is, so that it is the same objective whatever the network predicts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

Levels = Float[Array, "*b"]


def error_ratio(sigma: Levels, prediction_type: str) -> Levels:
    """The squared error of the network's output, where that of the x_0 it stands for is 1."""
    if prediction_type == "epsilon":
        return sigma**-2
    if prediction_type == "v_prediction":
        return 1 + sigma**-2
    if prediction_type == "flow_prediction":
        return (1 + 1 / sigma) ** 2
    return jnp.ones_like(sigma)


def unweighted(sigma: Levels, prediction_type: str) -> Levels:
    """The plain error of the output, at every level alike (Ho et al. 2020, eq. 14)."""
    return jnp.ones_like(sigma)


def min_snr(sigma: Levels, prediction_type: str, gamma: float = 5.0) -> Levels:
    """min(SNR, gamma) on x_0 (Hang et al. 2023, section 3.4); the signal-to-noise ratio is 1 / sigma^2."""
    return jnp.minimum(sigma**-2, gamma) / error_ratio(sigma, prediction_type)


def debiased(sigma: Levels, prediction_type: str) -> Levels:
    """1 / sqrt(SNR) on epsilon, so sqrt(SNR) on x_0 (Yu et al. 2023, debiased estimation)."""
    return 1 / sigma / error_ratio(sigma, prediction_type)


def edm(sigma: Levels, prediction_type: str, sigma_data: float = 1.0) -> Levels:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0 (Karras et al. 2022, table 1).

    For v at `sigma_data` 1, the spread of scaled latents, this is 1.
    """
    return (sigma**-2 + sigma_data**-2) / error_ratio(sigma, prediction_type)
