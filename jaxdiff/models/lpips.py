"""LPIPS: how far apart two images look to a classifier of photographs (Zhang et al. 2018).

The features of some layers, each pixel's of length 1, are compared; what a feature counts was learned from people's
judgements (version 0.1 of the paper's authors).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.conv import Conv, Conv3x3
from jaxdiff.types import Params

# Means and standard deviations of photographs in [-1, 1], by colour.
MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
STD = np.array([0.458, 0.448, 0.450], np.float32)
EPS = 1e-10  # beside the length of a pixel's features


class Layer(NamedTuple):
    """A convolution and ReLU, after max pooling of `pool` x `pool` pixels at stride 2 where that is not 0."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = True


BACKBONES: dict[str, tuple[Layer, ...]] = {
    # Krizhevsky 2014, in one column, as torchvision has it.
    "alex": (Layer(64, 11, 4, 2), Layer(192, 5, 1, 2, 3), Layer(384, pool=3), Layer(256), Layer(256)),
    # Simonyan & Zisserman 2015, table 1, column D: of each block the last convolution.
    "vgg": tuple(
        Layer(channels, pool=2 if i == 0 and channels > 64 else 0, compared=i == n - 1)
        for block, (channels, n) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
        for i in range(n)
    ),
}
SMALLEST = {"alex": 31, "vgg": 16}
"""Pixels along each side that the last layer needs."""


class Backbone(nn.Module):
    """Images in [-1, 1] to the features that are compared."""

    layers: tuple[Layer, ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        x = ((image - MEAN.reshape(1, 1, 1, 3)) / STD.reshape(1, 1, 1, 3)).astype(self.dtype)
        found = []
        for i, layer in enumerate(self.layers):
            if layer.pool:
                x = nn.max_pool(x, (layer.pool, layer.pool), (2, 2))
            if layer.kernel == 3:  # of which there are faster ones
                conv: Any = Conv3x3(layer.channels, dtype=self.dtype, name=f"conv_{i}")
            else:
                conv = Conv(
                    layer.channels, layer.kernel, layer.stride, layer.padding, self.dtype, name=f"conv_{i}"
                )  # fmt: skip
            x = nn.relu(conv(x))
            if layer.compared:
                found.append(x)
        return found


class LPIPS(nn.Module):
    """Pairs of images in [-1, 1] to their distances, from 0 (the same) to about 1."""

    backbone: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
        look = Backbone(BACKBONES[self.backbone], self.dtype, name="backbone")
        total = jnp.zeros(len(a))
        for i, (p, q) in enumerate(zip(look(a), look(b), strict=True)):
            weight = self.param(f"weight_{i}", nn.initializers.constant(1 / p.shape[-1]), (p.shape[-1],))
            off = jnp.square(unit(p) - unit(q)) * weight.astype(jnp.float32).reshape(1, 1, 1, -1)
            total += off.sum(-1).mean((1, 2))
        return total


def unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each pixel's features at length 1, in float32, or 0 where all of them are."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    # A root has no derivative at 0, and ReLU gives pixels that are 0 in all features: theirs would be NaN.
    return x / (jnp.sqrt(jnp.where(square > 0, square, 1.0)) + EPS)


def lpips_params(backbone: str, convs: Mapping[str, Any], weights: Mapping[str, Any]) -> Params:
    """The network's params, checked.

    Args:
        backbone: "alex" or "vgg".
        convs: {"kernel": [h, w, in, out], "bias": [out]} of each convolution, by number: "0", "1" and so on.
        weights: what each compared feature counts, by number, in any shape.

    Raises:
        ValueError: naming an array that is missing, or has another shape.
    """

    def array(found: Any, name: str, *shape: int) -> np.ndarray:
        if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.size != np.prod(shape):
            told = list(found.shape) if isinstance(found, np.ndarray) else "missing"
            raise ValueError(f"The weights of LPIPS ({backbone}) need {name} {list(shape)}; it is {told}.")
        return np.asarray(found, np.float32).reshape(shape)

    params: Params = {"backbone": {}}
    channels = 3
    for i, layer in enumerate(BACKBONES[backbone]):
        conv, name, k = convs.get(str(i), {}), f"convolution {i}", layer.kernel
        params["backbone"][f"conv_{i}"] = {
            "kernel": array(conv.get("kernel"), f"{name}'s kernel", k, k, channels, layer.channels),
            "bias": array(conv.get("bias"), f"{name}'s bias", layer.channels),
        }
        channels = layer.channels
    for i, layer in enumerate(layer for layer in BACKBONES[backbone] if layer.compared):
        params[f"weight_{i}"] = array(weights.get(str(i)), f"weights {i}", layer.channels)
    return params
