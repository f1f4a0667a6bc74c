"""What a network is trained to predict, and how its output and the clean latent x_0 follow from each other.

All functions are of the noised latent x = x_0 + sigma * eps, with x_0 of unit variance and eps standard normal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

# Latents and noise levels that broadcast: an image and a number, or a batch and [b, 1, 1, 1].
Latents = Float[Array, "*b"]
Levels = Float[Array, "*_"]


@dataclass(frozen=True)
class Prediction:
    """One kind of output that networks are trained for."""

    name: str
    """`SchedulerConfig.prediction_type`."""
    network_input: Callable[[Latents, Levels], Latents]
    """(x, sigma) -> x as the network takes it."""
    x_0: Callable[[Latents, Latents, Levels], Latents]
    """(out, x, sigma) -> the clean latent that the network's output `out` stands for; affine in `out`."""
    target: Callable[[Latents, Latents, Levels], Latents]
    """(x_0, eps, sigma) -> the output that the network is trained to give; the inverse of `x_0`."""
    error_ratio: Callable[[Levels], Levels]
    """sigma -> the squared error of the output where that of x_0 is 1."""
    flow: bool = False
    """Whether the model's noise levels are those of flow matching."""


def unit_variance(x: Latents, sigma: Levels) -> Latents:
    """sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, where alpha_bar = 1 / (1 + sigma^2) (Ho et al. 2020, eq. 4)."""
    return x / jnp.sqrt(1 + sigma**2)


EPSILON = Prediction(
    "epsilon",
    network_input=unit_variance,
    x_0=lambda out, x, sigma: x - sigma * out,
    target=lambda x_0, eps, sigma: eps,
    error_ratio=lambda sigma: sigma**-2,
)
"""The noise eps (Ho et al. 2020, section 3.2)."""

V = Prediction(
    "v_prediction",
    network_input=unit_variance,
    x_0=lambda out, x, sigma: x / (1 + sigma**2) - out * sigma / jnp.sqrt(1 + sigma**2),
    target=lambda x_0, eps, sigma: (eps - sigma * x_0) / jnp.sqrt(1 + sigma**2),
    error_ratio=lambda sigma: 1 + sigma**-2,
)
"""The velocity v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, appendix D)."""

SAMPLE = Prediction(
    "sample",
    network_input=unit_variance,
    x_0=lambda out, x, sigma: out,
    target=lambda x_0, eps, sigma: x_0,
    error_ratio=jnp.ones_like,
)
"""The clean latent x_0 itself."""

FLOW = Prediction(
    "flow_prediction",
    network_input=lambda x, sigma: x / (1 + sigma),
    x_0=lambda out, x, sigma: (x - sigma * out) / (1 + sigma),
    target=lambda x_0, eps, sigma: eps - x_0,
    error_ratio=lambda sigma: (1 + 1 / sigma) ** 2,
    flow=True,
)
"""The direction eps - x_0 of the straight line (1 - t) x_0 + t eps, where sigma = t / (1 - t); the network's input is
the point on that line (Liu et al. 2023, eq. 1)."""

PREDICTIONS: dict[str, Prediction] = {prediction.name: prediction for prediction in (EPSILON, V, SAMPLE, FLOW)}
