"""EfficientNet-Lite0, an ImageNet classifier of 4.65 million parameters, as features of images (for inference alone).

EfficientNet-B0 (Tan & Le 2019, table 1) without squeeze-and-excitation, with ReLU6 in place of swish, and of the same
width at every size. Its batch norms are folded into the convolutions before them (`efficientnet_params`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.nn.linear import Dense, add
from jaxdiff.types import Params

SIZE = 224
"""Pixels along each side of the images that the classifier was trained on."""
FEATURES = 1280
"""Numbers in an image's features."""
CLASSES = 1000
_EPS = 1e-3  # of the batch norms


class _Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride."""

    layers: int
    channels: int
    kernel: int
    stride: int
    expansion: int


STAGES = (
    _Stage(1, 16, 3, 1, 1),
    _Stage(2, 24, 3, 2, 6),
    _Stage(2, 40, 5, 2, 6),
    _Stage(3, 80, 3, 2, 6),
    _Stage(3, 112, 5, 1, 6),
    _Stage(4, 192, 5, 2, 6),
    _Stage(1, 320, 3, 1, 6),
)


class EfficientNetLite0(nn.Module):
    """Images in 0 to 255 to their features, and to the logits of ImageNet's 1,000 classes."""

    @nn.compact
    def __call__(self, image: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b 1280"], Float[Array, "b 1000"]]:
        x = (image - 127) / 128
        x = nn.relu6(Conv(32, kernel=3, stride=2, name="conv_stem")(x))
        i = 0
        for stage in STAGES:
            for layer in range(stage.layers):
                stride = stage.stride if layer == 0 else 1
                x = InvertedResidual(stage.channels, stage.kernel, stride, stage.expansion, name=f"blocks_{i}")(x)
                i += 1
        x = nn.relu6(Conv(FEATURES, name="conv_head")(x))
        features = x.mean((1, 2))
        return features, Dense(CLASSES, name="fc")(features)


class InvertedResidual(nn.Module):
    """Wider, a filter for each channel, narrower; plus the input, where it fits (Sandler et al. 2018, figure 4)."""

    channels: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        h = x
        if self.expansion > 1:
            h = nn.relu6(Conv(x.shape[-1] * self.expansion, name="expand_conv")(h))
        h = nn.relu6(DepthwiseConv(self.kernel, self.stride, name="depthwise_conv")(h))
        h = Conv(self.channels, name="project_conv")(h)
        return x + h if x.shape == h.shape else h


class Conv(nn.Module):
    """A convolution with TensorFlow's padding "SAME", which at stride 2 is larger below and to the right."""

    channels: int
    kernel: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (self.kernel, self.kernel, x.shape[-1], self.channels)
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        strides = (self.stride, self.stride)
        y = lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return add(y, bias)


class DepthwiseConv(nn.Module):
    """A filter for each channel, padded as in `Conv`.

    It is a sum of shifted images, which XLA fuses to one loop: with its convolution in groups the whole network takes
    4.8 times as long on a CPU (jax 0.10.2, 48 images a second against 10 on one core).
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        c, stride = x.shape[-1], self.stride
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.kernel, self.kernel, 1, c))
        bias = self.param("bias", nn.initializers.zeros_init(), (c,))
        padding = lax.padtype_to_pads(x.shape[1:3], (self.kernel, self.kernel), (stride, stride), "SAME")
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        h, w = ((n - self.kernel) // stride + 1 for n in x.shape[1:3])
        total = jnp.broadcast_to(bias, (x.shape[0], h, w, c))
        for i in range(self.kernel):
            for j in range(self.kernel):
                shifted = x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride]
                total += shifted * kernel[i, j, :, :][None, None]
        return total


def efficientnet_params(tensors: Mapping[str, np.ndarray]) -> Params:
    """The network's params from a state dict of PyTorch's, with the batch norms folded into the convolutions.

    Args:
        tensors: named as in Luke Melas-Kyriazi's EfficientNet-PyTorch: `_blocks.0._expand_conv.weight` [o, i, h, w],
            `_blocks.0._bn0.running_mean` and so on.

    Raises:
        ValueError: naming a tensor that is missing, or has another shape.
    """

    def tensor(name: str, *shape: int) -> np.ndarray:
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"The weights of EfficientNet-Lite0 need {name} {list(shape)}; it is {found}.")
        return np.asarray(tensors[name], np.float64)

    def folded(conv: str, norm: str, o: int, i: int, kernel: int) -> Params:
        weight = tensor(f"{conv}.weight", o, i, kernel, kernel)
        scale = tensor(f"{norm}.weight", o) / np.sqrt(tensor(f"{norm}.running_var", o) + _EPS)
        bias = tensor(f"{norm}.bias", o) - tensor(f"{norm}.running_mean", o) * scale
        return {"kernel": (weight.transpose(2, 3, 1, 0) * scale).astype(np.float32), "bias": bias.astype(np.float32)}

    channels = 32
    params: Params = {"conv_stem": folded("_conv_stem", "_bn0", channels, 3, 3)}
    for stage in STAGES:
        for _ in range(stage.layers):
            i = len(params) - 1
            name, wide, block = f"_blocks.{i}", channels * stage.expansion, {}
            if stage.expansion > 1:
                block["expand_conv"] = folded(f"{name}._expand_conv", f"{name}._bn0", wide, channels, 1)
            block["depthwise_conv"] = folded(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, stage.kernel)
            block["project_conv"] = folded(f"{name}._project_conv", f"{name}._bn2", stage.channels, wide, 1)
            params[f"blocks_{i}"], channels = block, stage.channels
    params["conv_head"] = folded("_conv_head", "_bn1", FEATURES, channels, 1)
    weight, bias = tensor("_fc.weight", CLASSES, FEATURES), tensor("_fc.bias", CLASSES)
    params["fc"] = {"kernel": weight.T.astype(np.float32), "bias": bias.astype(np.float32)}
    return params
