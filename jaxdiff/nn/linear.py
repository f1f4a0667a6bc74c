"""Matrix products, biases and look-ups, whose gradients are summed in float32 whatever a network computes in.

A bias is added to every pixel of every image, so that its gradient is a sum over all of them. In bfloat16, which has 8
bits of precision, such a sum stops growing at 256 times its summands: of 16,384 it is off by half.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdiff.types import Params


def add(x: Float[Array, "*shape"], y: Float[Array | np.ndarray, "*smaller"]) -> Float[Array, "*shape"]:
    """x + y in the type of `x`, over the shape of which `y` is repeated; y's gradient is summed in float32."""
    repeated: Array = _repeat(jnp.asarray(y), x.shape, x.dtype)  # pyright: ignore[reportAssignmentType]
    return x + repeated


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _repeat(y: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jnp.broadcast_to(y.astype(dtype), shape)


def _repeat_fwd(y: Array, shape: tuple[int, ...], dtype: DTypeLike) -> tuple[Array, Array]:
    return _repeat(y, shape, dtype), y


def _repeat_bwd(shape: tuple[int, ...], dtype: DTypeLike, y: Array, d: Array) -> tuple[Array]:
    sizes = (1,) * (len(shape) - y.ndim) + y.shape
    repeated = tuple(i for i, (size, all_) in enumerate(zip(sizes, shape, strict=True)) if size != all_)
    total = d.astype(jnp.float32).sum(repeated)
    return (total.reshape(y.shape).astype(y.dtype),)


_repeat.defvjp(_repeat_fwd, _repeat_bwd)


def at_width(x: Any, kernel: Any, dtype: DTypeLike) -> tuple[Array, Array]:
    """Both in `dtype`. A kernel stored in less is widened once `x` is there, and not for all steps of a loop."""
    if jnp.dtype(kernel.dtype).itemsize < jnp.dtype(dtype).itemsize:
        x, kernel = jax.lax.optimization_barrier((x, kernel))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


STEP = "step"
"""The name of what a kernel of 8 bits counts in, beside it: one number for each channel of the result."""
_NARROWED = 2**16
"""Numbers of a kernel from which it is worth 8 bits: smaller ones, of a network's ends, take no memory."""


def narrow(path: tuple[str, ...], module: Params) -> Params:
    """A module's arrays with its kernel in 8 bits: multiples, up to 127, of a step for each channel of the result.

    Half a step is at most 1/254 of the channel's largest weight, and the result is multiplied by the steps, so that
    products stay those of the small whole numbers, which bfloat16 holds exactly. Such a tree is for drawing alone.

    Args:
        path: the module's.
        module: its arrays by name.
    """
    kernel = module.get("kernel")
    if kernel is None or kernel.size < _NARROWED:
        return module
    return {**module, **_narrowed(kernel)}


@jax.jit
def _narrowed(kernel: Float[Array, "*c c2"]) -> Params:
    wide = kernel.astype(jnp.float32)
    step = jnp.abs(wide).max(range(wide.ndim - 1), keepdims=True) / 127
    return {"kernel": jnp.round(wide / jnp.where(step > 0, step, 1)).astype(jnp.int8), STEP: step.reshape(-1)}


def in_steps(y: Float[Array, "*b c2"], step: Float[Array, " c2"] | None) -> Float[Array, "*b c2"]:
    """The result of a kernel that counts in steps; of any other it is the result itself."""
    if step is None:
        return y
    return (y.astype(jnp.float32) * step.reshape((1,) * (y.ndim - 1) + (-1,))).astype(y.dtype)


class Dense(nn.Module):
    """x W + b. Parameters are those of `flax.linen.Dense`."""

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b {self.features}"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x, kernel = at_width(x, kernel, self.dtype)
        y = in_steps(x @ kernel, self.get_variable("params", STEP))
        if not self.use_bias:
            return y
        return add(y, self.param("bias", nn.initializers.zeros_init(), (self.features,)))


class Conv1x1(nn.Module):
    """A 1x1 convolution, as the matrix product over channels that it is. Parameters are those of `flax.linen.Conv`."""

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w {self.channels}"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, x.shape[-1], self.channels))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        x, kernel = at_width(x, kernel, self.dtype)
        return add(in_steps(x @ kernel[0, 0], self.get_variable("params", STEP)), bias)


class Embed(nn.Module):
    """A row of a table for each number. Parameters are those of `flax.linen.Embed`."""

    rows: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, numbers: Int[Array, "*b"]) -> Float[Array, "*b {self.features}"]:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.rows, self.features))
        return look_up(table, numbers, jnp.dtype(self.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array | np.ndarray, "v d"], numbers: Int[Array, "*b"], dtype: DTypeLike
) -> Float[Array, "*b d"]:
    """The table's rows of these numbers, in `dtype`.

    Rows of the gradient are sums over all places where a number stands, of which padding has most: 10,000 and more in a
    batch of short captions. Off the CPU they are a product with the one-hot numbers. A scatter, which `table[numbers]`
    has for a gradient, adds such rows one after another there: on GPUs by a loop of compare and swap where the numbers
    are bfloat16, and of float32 in some versions of XLA (openxla/xla#26371, #46225).
    """
    return jnp.take(table, numbers, axis=0).astype(dtype)


def _look_up_fwd(table: Array, numbers: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return look_up(table, numbers, dtype), (table, numbers)


def _look_up_bwd(dtype: DTypeLike, kept: tuple[Array, Array], d: Array) -> tuple[Array, None]:
    table, numbers = kept
    numbers, d = numbers.reshape(-1), d.reshape(-1, d.shape[-1])
    total = jax.lax.platform_dependent(
        numbers, d, cpu=partial(sum_by_scatter, rows=len(table)), default=partial(sum_by_product, rows=len(table))
    )
    return total.astype(table.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


def sum_by_scatter(numbers: Int[Array, " n"], d: Float[Array, "n d"], *, rows: int) -> Float[Array, "{rows} d"]:
    """For each number below `rows` the sum of the d where it stands, in float32, one after another."""
    return jnp.zeros((rows, d.shape[-1])).at[numbers].add(d.astype(jnp.float32))


def sum_by_product(numbers: Int[Array, " n"], d: Float[Array, "n d"], *, rows: int) -> Float[Array, "{rows} d"]:
    """The same as a matrix product: 2 n rows d operations, and n rows numbers of the type of `d` between.

    At batch 16 of 77 tokens, 49,408 rows and 768 features (SD1.5) these are 93 GFLOP and 122 MB, a four-hundredth of
    the step's work.
    """
    one_hot = jax.nn.one_hot(numbers, rows, dtype=d.dtype)
    # Ones and zeros are exact in any type: what is added up are the numbers themselves, where products are of all bits.
    return jnp.einsum("nv,nd->vd", one_hot, d, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
