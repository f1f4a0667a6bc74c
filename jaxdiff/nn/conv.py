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
from jaxdiff.nn.linear import STEP, add, at_width, in_steps
from jaxdiff.types import Params

Padding = tuple[tuple[int, int], tuple[int, int]]
Transformed = tuple[Float[Array, "a c2 c"], ...]
"""A kernel in Winograd's form: of a x a products, those of one column of the tile in each array.

Channels of the result come first: XLA's products (jax 0.10.2) copy a right operand that lies the other way.
"""

POINTS = {2: (0, 1, -1), 4: (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2)}
"""Where F(m x m, 3 x 3) evaluates its polynomials, beside infinity.

For m = 4 the usual 0, 1, -1, 2, -2 have twice the error (on random data 2.2e-6 against 1.0e-6 of the norm, at worst
7.6e-6 against 2.1e-6 of the largest value); the idea of other points is Barabasz et al. 2020, section 5. All numbers of
both transforms of the pixels are exact in float32.
"""


class Conv3x3(nn.Module):
    """A 3x3 convolution; padding 1 keeps the size at stride 1. Parameters are those of `flax.linen.Conv`.

    Where `prepare` has put a transformed kernel in the place of `kernel`, that is used.
    """

    channels: int
    stride: int = 1
    padding: int | Padding = 1
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 {self.channels}"]:
        n = self.padding
        padding = ((n, n), (n, n)) if isinstance(n, int) else n
        transformed = self.get_variable("params", "winograd")
        if transformed is None:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.channels))
            y: Any = conv3x3(*at_width(x, kernel, self.dtype), stride=self.stride, padding=padding)
            y = in_steps(y, self.get_variable("params", STEP))
        else:
            y = _prepared(x.astype(self.dtype), transformed, padding)
        if not self.use_bias:
            return y
        return add(y, self.param("bias", nn.initializers.zeros_init(), (self.channels,)))


def conv3x3(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c c2"],
    *,
    stride: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
) -> Float[Array, "b h2 w2 c2"]:
    """Convolves as `jax.lax.conv_general_dilated` does, to about 2e-6 of the result's norm."""
    return _conv3x3(x, kernel, padding, stride)


def _is_worth(x: Array, kernel: Array, padding: Padding, stride: int) -> bool:
    """Whether a CPU has a faster way than XLA's convolution."""
    c, c2 = kernel.shape[2:]
    worth = min(c, c2) >= 64 if stride == 1 else c * c2 >= STRIDED
    return x.dtype == jnp.float32 and worth and max(*padding[0], *padding[1]) <= 2


# Measured on two cores (Zen 3, AVX2), float32: time over that of PyTorch; kernels transformed before:
#
#   pixels, channels                 XLA    m = 4   m = 2
#   64 x 64, 320                     1.46   0.43    0.84
#   64 x 64, 960 -> 320              1.34   0.47    0.81
#   32 x 32, 640                     1.33   0.41    0.56
#   32 x 32, 1920 -> 640             1.24   0.36    0.56
#   32 x 32, 1280                           0.32    0.43
#   16 x 16, 1280                    1.43   0.47    0.39
#   16 x 16, 2560 -> 1280                   0.49    0.37
#   8 x 8, 1280                      1.62   0.63    0.39
#   512 x 512, 128 (16 bands)        1.49   0.80
#   128 x 128, 512                   1.52   0.58    0.80
#   64 x 64, 512                     1.15   0.50    0.77
#   8 images of 32 x 32, 64          2.31   0.94    0.84
#   8 images of 16 x 16, 128         2.23   0.93    1.24
#   8 images of 8 x 8, 256           2.34   1.01    0.70
#   8 images of 4 x 4, 256           2.00   1.27    1.26
#
# Rows of shifted products (three or nine of them, or one after im2col) lie between XLA and Winograd everywhere. At
# stride 2 one product after im2col takes 0.25 of XLA's time for 1280 channels at 16 x 16, 0.72 for 640 at 32 x 32, and
# for 320 at 64 x 64 more than it where there are two images.
#
# Where tiles are few, kernels are most of what is read. Stored with the result's channels first, and as left operands,
# they are not copied: 1280 channels at 8 x 8 take 6.7 ms in place of 14.4, 2560 -> 1280 take 12.2 in place of 29.9.

STRIDED = 640 * 640
"""The product of both numbers of channels from which a convolution with strides is one matrix product."""
FEW = 32
"""Tiles; so many or fewer are right operands."""


def tile(pixels: int, c: int, c2: int) -> int | None:
    """The m of F(m x m, 3 x 3) for so many pixels of the result and channels; None where XLA's convolution stands."""
    if min(c, c2) < 64 or pixels < 512:
        return None
    return prepared_tile(c, c2) or (4 if pixels >= 64 * 64 else 2)


def prepared_tile(c: int, c2: int) -> int | None:
    """The m for which `prepare` transforms a kernel; None for one that each call can afford to transform.

    So many channels stand where pixels are few: then a transformed kernel is most of what there is to read.
    """
    if min(c, c2) < 64 or c * c2 < 300 * 300:
        return None
    return 4 if c * c2 < 1280 * 1280 else 2


def prepare(path: tuple[str, ...], module: Params) -> Params:
    """A module's arrays, with the float32 kernel of a 3x3 convolution of stride 1 in Winograd's form where that pays.

    It is made once for all calls, for drawing on a CPU, and takes the kernel's place: such a tree cannot be saved,
    converted or trained.

    Args:
        path: the module's; those of downsamplers have stride 2.
        module: its arrays by name.
    """
    kernel = module.get("kernel")
    if kernel is None or kernel.ndim != 4 or kernel.shape[:2] != (3, 3) or kernel.dtype != jnp.float32:
        return module
    m = prepared_tile(*kernel.shape[2:])
    if m is None or any(name.startswith("downsamplers") for name in path):
        return module
    others = {name: leaf for name, leaf in module.items() if name != "kernel"}
    return others | {"winograd": _transform_kernel(kernel, m)}


def _plain(x: Array, kernel: Array, padding: Any, stride: int = 1, **dilation: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation
    )


def _on_cpu(x: Array, kernel: Array, *, padding: Padding, stride: int = 1) -> Array:
    if not _is_worth(x, kernel, padding, stride):
        return _plain(x, kernel, padding, stride)
    if stride != 1:
        return im2col(x, kernel, padding, stride)
    b, h, w = _size(x, padding)
    m = tile(b * h * w, *kernel.shape[2:])
    if m is None:
        return _plain(x, kernel, padding)
    return winograd(x, transform_kernel(kernel, m), padding=padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv3x3(x: Array, kernel: Array, padding: Padding, stride: int) -> Array:
    return _conv3x3_fwd(x, kernel, padding, stride)[0]


def _conv3x3_fwd(x: Array, kernel: Array, padding: Padding, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return checkpoint_name(_forward(x, kernel, padding, stride), KEPT), (x, kernel)


@partial(jax.jit, static_argnums=(2, 3))  # traced once for all layers of a shape
def _forward(x: Array, kernel: Array, padding: Padding, stride: int) -> Array:
    def elsewhere(x: Array, kernel: Array) -> Array:
        return _plain(x, kernel, padding, stride)

    on_cpu = _fold(partial(_on_cpu, padding=padding, stride=stride))
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


@partial(jax.jit, static_argnums=(0, 1))
def _conv3x3_bwd(padding: Padding, stride: int, kept: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    def on_cpu(x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
        if stride != 1 or not _is_worth(x, kernel, padding, stride):
            return plain_gradients(x, kernel, d_y, padding, stride)
        (top, bottom), (left, right) = padding
        d_padding = (2 - top, 2 - bottom), (2 - left, 2 - right)
        d_x = _fold(partial(_on_cpu, padding=d_padding))(d_y, kernel[::-1, ::-1].swapaxes(2, 3))
        b, h, w, _ = d_y.shape
        m = tile(b * h * w, *kernel.shape[2:])
        if m is None:
            return d_x, plain_gradients(x, kernel, d_y, padding, stride)[1]
        return d_x, kernel_gradient(x, d_y, m, padding=padding)

    def elsewhere(x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, kernel: _plain(x, kernel, padding, stride), x, kernel)[1](d_y)

    return jax.lax.platform_dependent(*kept, d_y, cpu=on_cpu, default=elsewhere)


def plain_gradients(x: Array, kernel: Array, d_y: Array, padding: Padding, stride: int) -> tuple[Array, Array]:
    """The gradients of `_plain` as convolutions of images by kernels, pixels and channels in their usual order.

    Only as such does XLA's CPU compiler (that of jax 0.10) have fast ones for what lies in a loop, of micro-batches or
    steps: outside of loops it turns others into these.
    """
    (h, w), (h2, w2) = x.shape[1:3], d_y.shape[1:3]
    # A row of the result reads from `stride` times its number, less the padding; what is left at the end is not read.
    over = [n + sum(p) - 3 - stride * (n2 - 1) for n, n2, p in zip((h, w), (h2, w2), padding, strict=True)]
    back = [(2 - first, 2 - last + rest) for (first, last), rest in zip(padding, over, strict=True)]
    d_x = _plain(d_y, kernel[::-1, ::-1].swapaxes(2, 3), back, lhs_dilation=(stride, stride))
    ends = [(first, last - rest) for (first, last), rest in zip(padding, over, strict=True)]
    d_kernel = _plain(x.transpose(3, 1, 2, 0), d_y.transpose(1, 2, 0, 3), ends, rhs_dilation=(stride, stride))
    return d_x, d_kernel.transpose(1, 2, 0, 3)


_conv3x3.defvjp(_conv3x3_fwd, _conv3x3_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _prepared(x: Array, transformed: Transformed, padding: Padding) -> Array:
    """The convolution by a kernel in Winograd's form. Gradients go to `x` alone."""
    return _fold(partial(winograd, padding=padding))(x, transformed)


def _prepared_fwd(x: Array, transformed: Transformed, padding: Padding) -> tuple[Array, Any]:
    return _prepared(x, transformed, padding), transformed


def _prepared_bwd(padding: Padding, transformed: Transformed, d_y: Array) -> tuple[Array, None]:
    b, h, w = (n - less for n, less in zip(d_y.shape, (0, sum(padding[0]) - 2, sum(padding[1]) - 2), strict=False))
    x = jax.ShapeDtypeStruct((b, h, w, transformed[0].shape[2]), d_y.dtype)
    (d_x,) = jax.linear_transpose(lambda x: winograd(x, transformed, padding=padding), x)(d_y)
    return d_x, None


_prepared.defvjp(_prepared_fwd, _prepared_bwd)


def _fold(f: Callable[[Array, Any], Array]) -> Callable[[Array, Any], Array]:
    """`f` for which images that `vmap` adds are a larger batch, as long as they share the kernel."""
    folded = custom_vmap(f)

    @folded.def_vmap
    def rule(n: int, mapped: Any, x: Array, kernel: Any) -> tuple[Array, bool]:
        if any(jax.tree.leaves(mapped[1])):
            axes = jax.tree.map(lambda one: 0 if one else None, tuple(mapped))
            return jax.vmap(f, in_axes=axes, axis_size=n)(x, kernel), True
        y = _fold(f)(x.reshape(-1, *x.shape[2:]), kernel)
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
    G = _matrices(m)[1]
    rows = jnp.stack([_combine(r, list(kernel.swapaxes(2, 3))) for r in G])
    return tuple(_combine(r, list(rows.swapaxes(0, 1))) for r in G)


def _both(m: int) -> np.ndarray:
    """G in both axes [column, row, y, x]: one small product in place of many sums, which take long to compile."""
    G = _matrices(m)[1]
    return np.einsum("jx,iy->jiyx", G, G).astype(np.float32)


_transform_kernel = jax.jit(transform_kernel, static_argnums=1)


def _combine(row: np.ndarray, arrays: list[Array]) -> Array:
    """The sum of the arrays, each times its number: no matrix product, since half of the numbers are 0 or 1."""
    terms = [a if c == 1 else float(c) * a for c, a in zip(row, arrays, strict=True) if c]
    return sum(terms[1:], terms[0])


def _transform(x: Float[Array, "b h w c"], matrix: np.ndarray, m: int, rows: int, columns: int) -> list[Array]:
    """M d M^T of rows x columns tiles d of x, m pixels apart: [i, tiles, c] for each j.

    One axis after the other: pixels that lie m apart are slices of whole rows of channels, which the compiler turns
    into loops that read and write memory in order.
    """
    size = matrix.shape[1]
    lines = [jax.lax.slice_in_dim(x, k, k + m * (rows - 1) + 1, m, axis=1) for k in range(size)]
    d = jnp.stack([_combine(r, lines) for r in matrix])
    lines = [jax.lax.slice_in_dim(d, k, k + m * (columns - 1) + 1, m, axis=3) for k in range(size)]
    return [_combine(r, lines).reshape(len(matrix), -1, x.shape[-1]) for r in matrix]


CACHED = 2**24
"""Bytes of transformed pixels that are made and used up at a time, so that they stay in the cache."""


def winograd(x: Float[Array, "b h w c"], transformed: Transformed, *, padding: Padding) -> Float[Array, "b h2 w2 c2"]:
    """The convolution of stride 1 by F(m x m, 3 x 3): Y = A^T [sum of U * (B^T d B)] A (Lavin & Gray 2016, eq. 12)."""
    a, c2 = len(transformed), transformed[0].shape[1]
    m = a - 2
    B, _, A = _matrices(m)
    b, h, w = _size(x, padding)
    rows, columns = -(-h // m), -(-w // m)
    bands = _bands(x, m, b, rows, columns)
    rows = -(-rows // bands)  # of tiles in a band
    (top, _), (left, _) = padding
    x = _pad(x, top, left, m * rows * bands + 2, m * columns + 2)

    def band(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        d = _transform(x, B, m, rows, columns)
        y = [_product(d_j, u_j).reshape(a, b, rows, columns, c2) for d_j, u_j in zip(d, transformed, strict=True)]
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


def _product(d: Float[Array, "a t c"], u: Float[Array, "a c2 c"]) -> Float[Array, "a t c2"]:
    """Sums over channels, for each of the tile's numbers in a column."""
    if d.shape[1] > FEW:
        return jnp.einsum("atc,adc->atd", d, u)
    # Without the barrier the compiler would make the other product of it.
    return jax.lax.optimization_barrier(jnp.einsum("adc,atc->adt", u, d)).swapaxes(1, 2)


def im2col(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c c2"], padding: Padding, stride: int) -> Array:
    """The convolution as one matrix product, of the nine pixels under the kernel side by side."""
    b, h, w = _size(x, padding)
    rows, columns = -(-h // stride), -(-w // stride)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    nine = [x[:, i : i + h : stride, j : j + w : stride] for i in range(3) for j in range(3)]
    y = jnp.concatenate(nine, axis=-1).reshape(b * rows * columns, -1) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(b, rows, columns, -1)


def kernel_gradient(
    x: Float[Array, "b h w c"], d_y: Float[Array, "b h2 w2 c2"], m: int, *, padding: Padding
) -> Float[Array, "3 3 c c2"]:
    """The gradient of `winograd`'s kernel, in as few products: G^T [sum over tiles of (B^T d B) * (A dy A^T)] G."""
    B, _, A = _matrices(m)
    _, h, w = _size(x, padding)
    rows, columns = -(-h // m), -(-w // m)
    (top, _), (left, _) = padding
    d = _transform(_pad(x, top, left, m * rows + 2, m * columns + 2), B, m, rows, columns)
    d_y = _pad(d_y, 0, 0, m * rows, m * columns)
    products = [
        jnp.einsum("itc,itd->icd", d_j, y_j) for d_j, y_j in zip(d, _transform(d_y, A.T, m, rows, columns), strict=True)
    ]
    return jnp.einsum("jiyx,jicd->yxcd", _both(m), jnp.stack(products), precision=jax.lax.Precision.HIGHEST)


def _bands(x: Array, m: int, b: int, rows: int, columns: int) -> int:
    """How many parts the tiles are worked on in; 1 unless the memory they take is many times the cache."""
    total = 4 * (m + 2) ** 2 * b * rows * columns * x.shape[-1]
    return 1 if total < 4 * CACHED else min(rows, total // CACHED)


def _pad(x: Array, top: int, left: int, h: int, w: int) -> Array:
    """Zeros all round x up to the height and width given."""
    return jnp.pad(x, ((0, 0), (top, h - x.shape[1] - top), (left, w - x.shape[2] - left), (0, 0)))


def _size(x: Array, padding: Padding) -> tuple[int, int, int]:
    """Images, height and width of the result at stride 1."""
    return x.shape[0], x.shape[1] + sum(padding[0]) - 2, x.shape[2] + sum(padding[1]) - 2
