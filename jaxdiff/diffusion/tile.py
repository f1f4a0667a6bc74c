"""Images larger than the model: the network on overlapping tiles."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.diffusion.denoiser import NetworkFn


def tiled(network_fn: NetworkFn, tile: tuple[int, int]) -> NetworkFn:
    """The network on overlapping tiles, averaged where they overlap (Bar-Tal et al. 2023, MultiDiffusion, eq. 5).

    Args:
        network_fn: is asked for [b, *tile, c], one tile after the other.
        tile: height and width in latent pixels; a side no longer than it has one tile.
    """

    def network(x_in: Float[Array, "b h w c"], t: Float[Array, ""]) -> Float[Array, "b h w c2"]:
        h, w = x_in.shape[-3:-1]
        corners = np.array([(y, x) for y in tile_starts(h, tile[0]) for x in tile_starts(w, tile[1])])
        size = min(h, tile[0]), min(w, tile[1])
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
        return total / count[None]

    return network


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles start: they cover the length evenly, and each overlaps the next by half of it or more."""
    if length <= tile:
        return [0]
    count = -(-(length - tile) // max(1, tile // 2)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]
