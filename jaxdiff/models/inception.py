"""InceptionV3 as FID looks through it (Szegedy et al. 2015, section 6), as features of images (for inference alone).

It is the network of TensorFlow's 2015 release with 1,008 classes, which differs from torchvision's in its pools: means
do not count the padding, and the last block takes the largest number in place of the mean. Its batch norms are folded
into the convolutions before them (`inception_params`).
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.nn.linear import Dense, add
from jaxdiff.types import Params

SIZE = 299
"""Pixels along each side of the images that it was trained on."""
FEATURES = 2048
CLASSES = 1008
_EPS = 1e-3  # of the batch norms


class InceptionV3(nn.Module):
    """Images in about [-1, 1] to their features, the mean of the last block over the pixels, and to the logits."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b 2048"], Float[Array, "b 1008"]]:
        x = Conv(32, (3, 3), stride=2, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), same=True, name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = BlockA(32, name="Mixed_5b")(x)
        x = BlockA(64, name="Mixed_5c")(x)
        x = BlockA(64, name="Mixed_5d")(x)
        x = ReductionB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        x = BlockC(192, name="Mixed_6e")(x)
        x = ReductionD(name="Mixed_7a")(x)
        x = BlockE(largest=False, name="Mixed_7b")(x)
        x = BlockE(largest=True, name="Mixed_7c")(x)
        features = x.mean((1, 2))
        return features, Dense(CLASSES, name="fc")(features)


class Conv(nn.Module):
    """A convolution with a folded batch norm, and a ReLU; padded to keep its size where `same`."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        shape = (*self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        y = lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            "SAME" if self.same else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return nn.relu(add(y, bias))


class BlockA(nn.Module):
    """Figure 5: a 5x5 convolution, two 3x3 ones, a pool and a 1x1 one, side by side."""

    pooled: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        one = Conv(64, name="branch1x1")(x)
        five = Conv(48, name="branch5x5_1")(x)
        five = Conv(64, (5, 5), same=True, name="branch5x5_2")(five)
        three = Conv(64, name="branch3x3dbl_1")(x)
        three = Conv(96, (3, 3), same=True, name="branch3x3dbl_2")(three)
        three = Conv(96, (3, 3), same=True, name="branch3x3dbl_3")(three)
        pool = Conv(self.pooled, name="branch_pool")(_mean_pool(x))
        return jnp.concatenate([one, five, three, pool], axis=-1)


class ReductionB(nn.Module):
    """Halves the sides: figure 10, with one and two 3x3 convolutions."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        three = Conv(384, (3, 3), stride=2, name="branch3x3")(x)
        double = Conv(64, name="branch3x3dbl_1")(x)
        double = Conv(96, (3, 3), same=True, name="branch3x3dbl_2")(double)
        double = Conv(96, (3, 3), stride=2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([three, double, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockC(nn.Module):
    """Figure 6: 7x7 convolutions as pairs of 1x7 and 7x1."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 768"]:
        across, down, c = (1, 7), (7, 1), self.channels
        one = Conv(192, name="branch1x1")(x)
        seven = Conv(c, name="branch7x7_1")(x)
        seven = Conv(c, across, same=True, name="branch7x7_2")(seven)
        seven = Conv(192, down, same=True, name="branch7x7_3")(seven)
        double = Conv(c, name="branch7x7dbl_1")(x)
        double = Conv(c, down, same=True, name="branch7x7dbl_2")(double)
        double = Conv(c, across, same=True, name="branch7x7dbl_3")(double)
        double = Conv(c, down, same=True, name="branch7x7dbl_4")(double)
        double = Conv(192, across, same=True, name="branch7x7dbl_5")(double)
        pool = Conv(192, name="branch_pool")(_mean_pool(x))
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class ReductionD(nn.Module):
    """Halves the sides, with a 3x3 convolution, and one after a 7x7."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        three = Conv(192, name="branch3x3_1")(x)
        three = Conv(320, (3, 3), stride=2, name="branch3x3_2")(three)
        seven = Conv(192, name="branch7x7x3_1")(x)
        seven = Conv(192, (1, 7), same=True, name="branch7x7x3_2")(seven)
        seven = Conv(192, (7, 1), same=True, name="branch7x7x3_3")(seven)
        seven = Conv(192, (3, 3), stride=2, name="branch7x7x3_4")(seven)
        return jnp.concatenate([three, seven, nn.max_pool(x, (3, 3), (2, 2))], axis=-1)


class BlockE(nn.Module):
    """Figure 7: 3x3 convolutions as 1x3 and 3x1 side by side."""

    largest: bool
    """Whether the pool takes the largest number: FID's last block does."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2048"]:
        across, down = (1, 3), (3, 1)
        one = Conv(320, name="branch1x1")(x)
        three = Conv(384, name="branch3x3_1")(x)
        three = [Conv(384, across, same=True, name="branch3x3_2a")(three),
                 Conv(384, down, same=True, name="branch3x3_2b")(three)]  # fmt: skip
        double = Conv(448, name="branch3x3dbl_1")(x)
        double = Conv(384, (3, 3), same=True, name="branch3x3dbl_2")(double)
        double = [Conv(384, across, same=True, name="branch3x3dbl_3a")(double),
                  Conv(384, down, same=True, name="branch3x3dbl_3b")(double)]  # fmt: skip
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.largest else _mean_pool(x)
        return jnp.concatenate([one, *three, *double, Conv(192, name="branch_pool")(pooled)], axis=-1)


def _mean_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of 3x3 pixels, at the edges of those that there are."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def inception_params(tensors: Mapping[str, np.ndarray]) -> Params:
    """The network's params from a state dict of PyTorch's, with the batch norms folded into the convolutions.

    Args:
        tensors: named as in torchvision and pt_inception-2015-12-05: `Mixed_5b.branch1x1.conv.weight` [o, i, h, w],
            `Mixed_5b.branch1x1.bn.running_mean` and so on, `fc.weight`. Others are left alone.

    Raises:
        ValueError: naming a tensor that is missing, has another shape, or values that are not finite.
    """

    def tensor(name: str, *shape: int) -> np.ndarray:
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"The weights of FID's InceptionV3 need {name} {list(shape)}; it is {found}.")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"The weights of FID's InceptionV3 have values in {name} that are not finite.")
        return np.asarray(tensors[name], np.float64)

    def filled(name: str, node: Params) -> Params:
        if "kernel" not in node:
            return {key: filled(f"{name}.{key}".lstrip("."), below) for key, below in node.items()}
        *window, i, o = node["kernel"].shape
        if not window:
            kernel, bias = tensor(f"{name}.weight", o, i).T, tensor(f"{name}.bias", o)
        else:
            scale = tensor(f"{name}.bn.weight", o) / np.sqrt(tensor(f"{name}.bn.running_var", o) + _EPS)
            kernel = tensor(f"{name}.conv.weight", o, i, *window).transpose(2, 3, 1, 0) * scale
            bias = tensor(f"{name}.bn.bias", o) - tensor(f"{name}.bn.running_mean", o) * scale
        return {"kernel": np.ascontiguousarray(kernel, np.float32), "bias": bias.astype(np.float32)}

    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return filled("", jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"])
