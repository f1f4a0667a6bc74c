"""The training loss (Ho et al. 2020, eq. 14; for flow matching Liu et al. 2023, eq. 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxdiff.diffusion.denoiser import network_input, target
from jaxdiff.diffusion.schedule import Schedule
from jaxdiff.diffusion.timesteps import DrawFn, uniform
from jaxdiff.diffusion.weights import unweighted
from jaxdiff.types import Context, Key

# (x_in [b h w c], t [b], context [b t d]) -> what the network predicts [b h w c]
BatchNetworkFn = Callable[[Float[Array, "b h w c"], Float[Array, " b"], Context], Float[Array, "b h w c"]]
# (sigma [b], prediction type) -> [b]
WeightFn = Callable[[Float[Array, " b"], str], Float[Array, " b"]]


def diffusion_loss(
    network_fn: BatchNetworkFn,
    x_0: Float[Array, "b h w c"],
    context: Context,
    key: Key,
    index: Integer[Array, " b"],
    *,
    schedule: Schedule,
    prediction_type: str,
    weight_fn: WeightFn = unweighted,
    draw_fn: DrawFn | None = None,
    noise_offset: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Array]]:
    """The mean squared error of one denoising step, each sample at its own random noise level.

    Args:
        network_fn: the network, parameters bound.
        x_0: clean latents, scaled to unit variance.
        context: the captions' features.
        key: the run's key.
        index: global sample numbers. A sample's draws depend on (key, index) alone, so not on batch, host or mesh.
        schedule: the noise levels.
        prediction_type: epsilon, v_prediction, sample or flow_prediction.
        weight_fn: how much each level counts; see `jaxdiff.diffusion.weights`.
        draw_fn: which levels are drawn; see `jaxdiff.diffusion.timesteps`. None draws all alike.
        noise_offset: the size of a constant that each channel's noise has added, so that whole pictures learn to be
            dark or bright (Guttenberg 2023).

    Returns:
        The loss; `mse`, which is the error before weights; and for each sample its `level` and the weighted `loss`.
    """
    draw_fn = draw_fn or uniform(len(schedule.alpha_bar))

    def draw(index: Integer[Array, ""]) -> tuple[Array, Array, Array]:
        level_key, noise_key, offset_key = jax.random.split(jax.random.fold_in(key, index), 3)
        eps = jax.random.normal(noise_key, x_0.shape[1:])
        if noise_offset:
            eps += noise_offset * jax.random.normal(offset_key, x_0.shape[-1:])
        return *draw_fn(level_key), eps

    level, share, eps = jax.vmap(draw)(index)
    sigma = jnp.asarray(schedule.sigmas, jnp.float32)[level]
    t = jnp.asarray(schedule.times, jnp.float32)[level]
    each = sigma[:, None, None, None]
    out = network_fn(network_input(x_0 + each * eps, each, prediction_type), t, context).astype(jnp.float32)
    error = jnp.mean((out - target(x_0, eps, each, prediction_type)) ** 2, axis=(1, 2, 3))
    loss = weight_fn(sigma, prediction_type) * error
    return jnp.mean(share * loss), {"mse": jnp.mean(error)}, {"level": level, "loss": jax.lax.stop_gradient(loss)}
