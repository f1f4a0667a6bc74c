"""The 3x3 convolution. On a CPU it is computed by Winograd's algorithm where that is the faster way.

XLA's own convolution of float32 on a CPU takes 1.4 to 1.6 times as long as PyTorch's (oneDNN), while its matrix
products keep up. F(m x m, 3 x 3) (Lavin & Gray 2016, eq. 12) makes m^2 pixels of the result from (m + 2)^2 products
instead of 9 m^2: 2.25 times fewer for m = 2, four times for m = 4.

All of it is inside the CPU's branch of `jax.lax.platform_dependent`: programs for other platforms, also those that a
CPU's host compiles, have XLA's convolution and nothing else.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.layers import KEPT
from jaxdiff.types import Params

Padding = tuple[tuple[int, int], tuple[int, int]]
Transformed = tuple[Float[Array, "a c c2"], ...]
"""A kernel in Winograd's form: of a x a products, those of one column of the tile in each array."""

POINTS = {2: (0, 1, -1), 4: (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)}
"""Where F(m x m, 3 x 3) evaluates its polynomials, beside infinity.

For m = 4 the usual 0, 1, -1, 2, -2 have twice the error (on random data 2.2e-6 against 1.0e-6 of the norm, at worst
7.6e-6 against 2.1e-6 of the largest value); the idea of other points is Barabasz et al. 2020, section 5. All numbers of
both transforms of the pixels are exact in float32.
"""


class Conv3x3(nn.Module):
    """A 3x3 convolution; padding 1 keeps the size at stride 1. Parameters are those of `flax.linen.Conv`.

    Where `prepare` has put a transformed kernel beside `kernel`, it is used on a CPU.
    """

    channels: int
    stride: int = 1
    padding: int | Padding = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 {self.channels}"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.channels))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        transformed = self.get_variable("params", "winograd")
        x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel, bias))
        n = self.padding
        padding = ((n, n), (n, n)) if isinstance(n, int) else n
        return conv3x3(x, kernel, transformed, stride=self.stride, padding=padding) + bias


def conv3x3(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c c2"],
    transformed: Transformed | None = None,
    *,
    stride: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
) -> Float[Array, "b h2 w2 c2"]:
    """Convolves as `jax.lax.conv_general_dilated` does, to about 2e-6 of the result's norm.

    Gradients go to `x` and `kernel`; `transformed` is the kernel once more and gets none.
    """
    b, h, w = _size(x, padding)
    possible = stride == 1 and x.dtype == jnp.float32 and max(*padding[0], *padding[1]) <= 2
    m = tile(b * h * w, *kernel.shape[2:]) if possible else None
    if m is None:
        return _plain(x, kernel, padding, stride)
    return _conv3x3(x, kernel, transformed, padding, m)


def tile(pixels: int, c: int, c2: int) -> int | None:
    """The m of F(m x m, 3 x 3) for so many pixels of the result and channels; None where XLA's convolution stands."""
    if min(c, c2) < 64 or pixels < 64:
        return None
    if prepared_tile(c, c2) is not None:
        return prepared_tile(c, c2)
    return 4 if pixels >= 128 * 128 else 2


def prepared_tile(c: int, c2: int) -> int | None:
    """The m for which `prepare` transforms a kernel; None for one that each call can afford to transform."""
    if min(c, c2) < 64 or c * c2 < 300 * 300:
        return None
    return 4 if c * c2 < 1280 * 1280 else 2


def prepare(params: Params) -> Params:
    """The same tree with 3x3 kernels in Winograd's form beside them, made once for all calls.

    For drawing on a CPU. It is no tree to save, convert or train: keep the one it was made from.
    """
    out: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            out[name] = prepare(value)
            continue
        out[name] = value
        if name == "kernel" and value.ndim == 4 and value.shape[:2] == (3, 3) and value.dtype == jnp.float32:
            m = prepared_tile(*value.shape[2:])
            if m is not None:
                out["winograd"] = jax.jit(transform_kernel, static_argnums=1)(value, m)
    return out


def _plain(x: Array, kernel: Array, padding: Padding, stride: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv3x3(x: Array, kernel: Array, transformed: Transformed | None, padding: Padding, m: int) -> Array:
    return _conv3x3_fwd(x, kernel, transformed, padding, m)[0]


def _conv3x3_fwd(
    x: Array, kernel: Array, transformed: Transformed | None, padding: Padding, m: int
) -> tuple[Array, tuple[Array, Array]]:
    def on_cpu(x: Array, kernel: Array, transformed: Transformed | None) -> Array:
        return _fold(partial(winograd, padding=padding))(x, transformed or transform_kernel(kernel, m))

    def elsewhere(x: Array, kernel: Array, transformed: Transformed | None) -> Array:
        return _plain(x, kernel, padding)

    y = jax.lax.platform_dependent(x, kernel, transformed, cpu=on_cpu, default=elsewhere)
    return checkpoint_name(y, KEPT), (x, kernel)


def _conv3x3_bwd(padding: Padding, m: int, kept: tuple[Array, Array], d_y: Array) -> tuple[Array, Array, None]:
    def on_cpu(x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
        mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
        (top, bottom), (left, right) = padding
        d_padding = (2 - top, 2 - bottom), (2 - left, 2 - right)
        d_x = _fold(partial(winograd, padding=d_padding))(d_y, transform_kernel(mirrored, m))
        _, pull = jax.vjp(lambda kernel: _plain(x, kernel, padding), kernel)
        return d_x, *pull(d_y)

    def elsewhere(x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, kernel: _plain(x, kernel, padding), x, kernel)[1](d_y)

    d_x, d_kernel = jax.lax.platform_dependent(*kept, d_y, cpu=on_cpu, default=elsewhere)
    return d_x, d_kernel, None


_conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)


def _fold(f: Callable[[Array, Transformed], Array]) -> Callable[[Array, Transformed], Array]:
    """`f` for which images that `vmap` adds are a larger batch, as long as they share the kernel."""
    folded = custom_vmap(f)

    @folded.def_vmap
    def rule(n: int, mapped: Any, x: Array, transformed: Any) -> tuple[Array, bool]:
        x_mapped, kernel_mapped = mapped
        if any(kernel_mapped):
            axes = (0 if x_mapped else None, tuple(0 if k else None for k in kernel_mapped))
            return jax.vmap(f, in_axes=axes, axis_size=n)(x, transformed), True
        y = _fold(f)(x.reshape(-1, *x.shape[2:]), transformed)
        return y.reshape(n, -1, *y.shape[1:]), True

    return folded


def _matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T [a, a], G [a, 3] and A^T [m, a] of F(m, 3), a = m + 2: y = A^T ((G g) * (B^T d)) (Lavin & Gray 2016, eq. 8).

    The Lagrange polynomials of the points, their denominators with the kernel; the last row belongs to infinity.
    """
    points = POINTS[m]
    B, G, A = np.zeros((m + 2, m + 2)), np.zeros((m + 2, 3)), np.zeros((m, m + 2))
    for i, point in enumerate(points):
        others = [p for p in points if p != point]
        B[i, : m + 1] = np.poly(others)[::-1]
        G[i] = point ** np.arange(3) / np.prod([point - p for p in others])
        A[:, i] = point ** np.arange(m)
    B[-1] = np.poly(points)[::-1]
    G[-1, -1] = A[-1, -1] = 1
    return B, G, A


def transform_kernel(kernel: Float[Array, "3 3 c c2"], m: int) -> Transformed:
    """G g G^T for each pair of channels (Lavin & Gray 2016, eq. 8), for F(m x m, 3 x 3)."""
    G = jnp.asarray(_matrices(m)[1], kernel.dtype)
    u = jnp.einsum("ir,jc,rcxy->jixy", G, G, kernel, precision=jax.lax.Precision.HIGHEST)
    return tuple(u)


def _combine(row: np.ndarray, arrays: list[Array]) -> Array:
    """The sum of the arrays, each times its number: no matrix product, since half of the numbers are 0 or 1."""
    terms = [a if c == 1 else float(c) * a for c, a in zip(row, arrays, strict=True) if c]
    return sum(terms[1:], terms[0])


CACHED = 2**24
"""Bytes of transformed pixels that are made and used up at a time, so that they stay in the cache."""


def winograd(x: Float[Array, "b h w c"], transformed: Transformed, *, padding: Padding) -> Float[Array, "b h2 w2 c2"]:
    """The convolution of stride 1 by F(m x m, 3 x 3): Y = A^T [sum of U * (B^T d B)] A (Lavin & Gray 2016, eq. 12).

    One axis of the tiles after the other: pixels that lie m apart are slices of whole rows of channels, which the
    compiler turns into loops that read and write memory in order.
    """
    a, c2 = len(transformed), transformed[0].shape[-1]
    m = a - 2
    B, _, A = _matrices(m)
    b, h, w = _size(x, padding)
    rows, columns = -(-h // m), -(-w // m)
    total = 4 * a * a * b * rows * columns * x.shape[-1]
    bands = 1 if total < 4 * CACHED else min(rows, total // CACHED)
    rows = -(-rows // bands)  # of tiles in a band
    (top, _), (left, _) = padding
    fill = (m * rows * bands + 2 - x.shape[1] - top, m * columns + 2 - x.shape[2] - left)
    x = jnp.pad(x, ((0, 0), (top, fill[0]), (left, fill[1]), (0, 0)))

    def band(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        lines = [jax.lax.slice_in_dim(x, k, k + m * (rows - 1) + 1, m, axis=1) for k in range(a)]
        d = jnp.stack([_combine(r, lines) for r in B])
        lines = [jax.lax.slice_in_dim(d, k, k + m * (columns - 1) + 1, m, axis=3) for k in range(a)]
        d = [_combine(r, lines).reshape(a, -1, x.shape[-1]) for r in B]
        y = [jnp.matmul(d_j, u_j).reshape(a, b, rows, columns, c2) for d_j, u_j in zip(d, transformed, strict=True)]
        y = jnp.stack([_combine(r, y) for r in A], axis=4).reshape(a, b, rows, columns * m, c2)
        y = jnp.stack([_combine(r, list(y)) for r in A], axis=2)
        return y.reshape(b, rows * m, columns * m, c2)

    if bands == 1:
        return band(x)[:, :h, :w]

    def numbered(i: Array) -> Array:
        # The barrier keeps the last step of the transform apart from the copy into the result, which is not threaded.
        return jax.lax.optimization_barrier(band(jax.lax.dynamic_slice_in_dim(x, i * m * rows, m * rows + 2, axis=1)))

    y = jnp.moveaxis(jax.lax.map(numbered, jnp.arange(bands)), 0, 1)
    return y.reshape(b, bands * rows * m, columns * m, c2)[:, :h, :w]


def _size(x: Array, padding: Padding) -> tuple[int, int, int]:
    """Images, height and width of the result at stride 1."""
    return x.shape[0], x.shape[1] + sum(padding[0]) - 2, x.shape[2] + sum(padding[1]) - 2
