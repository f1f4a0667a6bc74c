"""Where on a picture the model works: the part that a mask leaves free, and windows of a picture larger than itself."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.diffusion.denoiser import NetworkFn
from jaxdiff.types import DenoiseFn, Latent, Sigma


def inpainted(denoise_fn: DenoiseFn, known: Latent, mask: Float[Array, "*b h w 1"], noise: Latent) -> DenoiseFn:
    """Takes the known latent where the mask is 0, and the model's guess where it is 1 (Lugmayr et al. 2022, eq. 8, for
    the guess of x_0 instead of each step's result, and so for any sampler).

    Args:
        denoise_fn: the model.
        known: the clean latent to keep.
        mask: 1 is drawn, 0 is kept, and values between mix the two.
        noise: the unit normal noise of the kept part, the same at every level.
    """

    def denoise(x: Latent, sigma: Sigma) -> Latent:
        x = mask * x + (1 - mask) * (known + sigma * noise)
        return mask * denoise_fn(x, sigma) + (1 - mask) * known

    return denoise


def windowed(network_fn: NetworkFn, window: tuple[int, int]) -> NetworkFn:
    """The network on overlapping windows, averaged where they overlap (Bar-Tal et al. 2023, MultiDiffusion, eq. 5).

    Args:
        network_fn: is asked for [b, *window, c], one window after the other.
        window: height and width in latent pixels; a side no longer than it is one window.
    """

    def network(x_in: Float[Array, "b h w c"], t: Float[Array, ""]) -> Float[Array, "b h w c2"]:
        h, w = x_in.shape[-3:-1]
        corners = np.array([(y, x) for y in window_starts(h, window[0]) for x in window_starts(w, window[1])])
        size = min(h, window[0]), min(w, window[1])
        if len(corners) == 1:
            return network_fn(x_in, t)

        def add(sums: tuple[Array, Array], corner: Array) -> tuple[tuple[Array, Array], None]:
            total, count = sums
            y, x = corner
            part = jax.lax.dynamic_slice(x_in, (0, y, x, 0), (len(x_in), *size, x_in.shape[-1]))
            out = network_fn(part, t).astype(jnp.float32)
            here = jax.lax.dynamic_slice(total, (0, y, x, 0), out.shape)
            total = jax.lax.dynamic_update_slice(total, here + out, (0, y, x, 0))
            here = jax.lax.dynamic_slice(count, (y, x, 0), (*size, 1))
            return (total, jax.lax.dynamic_update_slice(count, here + 1, (y, x, 0))), None

        channels = jax.eval_shape(network_fn, x_in[:, : size[0], : size[1]], t).shape[-1]
        start = jnp.zeros((len(x_in), h, w, channels)), jnp.zeros((h, w, 1))
        (total, count), _ = jax.lax.scan(add, start, jnp.asarray(corners))
        return total / count

    return network


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin: they cover the length evenly, and each overlaps the next by half of it or more."""
    if length <= window:
        return [0]
    count = -(-(length - window) // max(1, window // 2)) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]
