"""The training loss (Ho et al. 2020, eq. 14; for flow matching Liu et al. 2023, eq. 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxdiff.diffusion.prediction import Prediction
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.timesteps import DrawFn, uniform
from jaxdiff.diffusion.weights import unweighted
from jaxdiff.types import Context, Key

# (x_in [b h w c], t [b], context [b t d]) -> the network's output [b h w c]
BatchNetworkFn = Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]
# (sigma [b], prediction) -> [b]
WeightFn = Callable[[Float[Array, " b"], Prediction], Float[Array, " b"]]


def diffusion_loss(
    network_fn: BatchNetworkFn,
    x_0: Float[Array, "b h w c"],
    context: Context,
    key: Key,
    index: Integer[Array, " b"],
    *,
    schedule: NoiseSchedule,
    prediction: Prediction,
    weight_fn: WeightFn = unweighted,
    draw_fn: DrawFn | None = None,
    noise_offset: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Array]]:
    """The mean squared error of one denoising step, each sample at its own random noise level.

    Args:
        network_fn: the network with its parameters bound.
        x_0: clean latents, scaled to unit variance.
        context: the captions' features.
        key: the run's key.
        index: global sample numbers. A sample's draws depend on (key, index) alone, so not on batch, host or mesh.
        schedule: the noise levels.
        prediction: what the network predicts.
        weight_fn: gives how much each level counts; see `jaxdiff.diffusion.weights`.
        draw_fn: draws a sample's level; see `jaxdiff.diffusion.timesteps`. None draws all levels alike.
        noise_offset: the size of a constant that each channel's noise has added, so that whole images learn to be
            dark or bright (Guttenberg 2023).

    Returns:
        The loss; `mse`, which is the error before weights; and for each sample its `level` and the weighted `loss`.
    """
    draw_fn = draw_fn or uniform(len(schedule.alpha_bar))

    def draw(index: Integer[Array, ""]) -> tuple[Array, Array, Array]:
        level_key, noise_key, offset_key = jax.random.split(jax.random.fold_in(key, index), 3)
        eps = jax.random.normal(noise_key, x_0.shape[1:])
        if noise_offset:
            eps += noise_offset * jax.random.normal(offset_key, (1, 1, x_0.shape[-1]))
        return *draw_fn(level_key), eps

    level, share, eps = jax.vmap(draw)(index)
    sigma = jnp.asarray(schedule.sigmas, jnp.float32)[level]
    t = jnp.asarray(schedule.times, jnp.float32)[level]
    each = sigma[:, None, None, None]
    out = network_fn(prediction.network_input(x_0 + each * eps, each), t, context).astype(jnp.float32)
    error = jnp.mean((out - prediction.target(x_0, eps, each)) ** 2, axis=(1, 2, 3))
    loss = weight_fn(sigma, prediction) * error
    return jnp.mean(share * loss), {"mse": jnp.mean(error)}, {"level": level, "loss": jax.lax.stop_gradient(loss)}
