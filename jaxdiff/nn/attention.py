"""Attention, and the transformer that lets every pixel read the prompt."""

import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdiff.nn.layers import KEPT, GroupNorm, LayerNorm, recomputed
from jaxdiff.nn.linear import Conv1x1, Dense
from jaxdiff.types import Context, Params

DENSE = 128 * 128
"""Up to so many scores a head, they are simply kept for the backward pass."""
BLOCK_KEYS = 1024
BLOCK_NUMBERS = 4096 * 64
"""Others exist in blocks. In loops of JAX's own operations, so many keys, or small ones of so many numbers together,
meet queries (and heads) at a time,"""
CPU_SCORES = 512 * 1024
GPU_SCORES = 16 * 1024**2
"""and so many scores are there: what a CPU's caches hold, and what keeps a GPU busy."""
CONTEXT_KEYS = ("to_k", "to_v")
"""The projections of what is attended to."""

portable = jax.make_user_context(False)
"""`with portable(True)`, programs are traced without kernels: of XLA's operations alone, which other platforms and
later versions know, too."""

Tokens = Float[Array, "b t h d"]
Keys = Float[Array, "b s h d"]
Statistics = Float[Array, "b h t"]


def attend(q: Tokens, k: Keys, v: Keys, mask: Bool[Array, "t s"] | None = None) -> Tokens:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32 (Vaswani et al. 2017, eq. 1); `mask` is True where allowed.

    The scores of a mask, or few of them, are computed at once. Others exist in blocks only, and again in the backward
    pass: on a TPU by `jaxdiff.nn.flash`, on NVIDIA by cuDNN, which takes 16-bit numbers and heads of some sizes,
    everywhere else by loops. A mesh in context (`jax.set_mesh`, or
    `jax.sharding.use_abstract_mesh` where a program is traced) splits batch and heads, and nothing travels.
    """
    if mask is not None or q.shape[1] * k.shape[1] <= DENSE:
        return _dense(q, k, v, mask)
    if portable.value or not _cudnn_takes(q.shape, k.shape, jnp.dtype(q.dtype)):
        return _blockwise(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=_cudnn, default=_blockwise)


@jax.jit  # compiled once for all layers of a shape
def _dense(q: Tokens, k: Keys, v: Keys, mask: Bool[Array, "t s"] | None = None) -> Tokens:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # heads first: plain batched matrix products
    scores = _product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores if mask is None else jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)


def _cudnn(q: Tokens, k: Keys, v: Keys) -> Tokens:
    attention = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if k.shape[1] % 2 == 0:
        return attention(q, k, v)
    # The backward pass takes no odd number of keys: one more, which nothing sees. Lengths come from the arrays, so that
    # `jax.vmap` maps them as well, without which cuDNN's rule for it fails (jax 0.10.2).
    none = jnp.isnan(q[:, 0, 0, 0]).astype(jnp.int32) * 0
    k_, v_ = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
    return attention(q, k_, v_, query_seq_lengths=none + q.shape[1], key_value_seq_lengths=none + k.shape[1])


@cache
def _cudnn_takes(q: tuple[int, ...], k: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether JAX finds cuDNN here, and that it takes such arrays and gradients, which it tells by errors."""
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k))  # pyright: ignore
    try:
        jax.eval_shape(lambda q, k, v: jax.vjp(_cudnn, q, k, v)[1](q), q, k, k)
    except (RuntimeError, NotImplementedError):
        return False
    return True


# Blocks. The forward pass returns the logarithm of each query's sum of exponentials, too, from which the backward pass
# computes the scores again (Dao 2023, FlashAttention-2, algorithms 1 and 2).


def _spread(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of arrays [b t h d] and statistics [b h t], on its own part of the batch and the heads on every device.

    XLA does not split kernels. An axis that `jax.vmap` adds becomes part of the batch, so that it is split, too.
    """

    @jax.jit  # traced once for all layers of a shape
    def here(*arrays: Array) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        free = {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}
        (b, _, h, _) = arrays[0].shape
        batch = tuple(name for name in ("data", "fsdp") if name in free)
        batch = batch if b % math.prod(free[name] for name in batch) == 0 else None
        heads = "tensor" if "tensor" in free and h % free["tensor"] == 0 else None
        if math.prod(free.values()) == 1:
            return f(*arrays)

        def spec(x: Any) -> P:
            return P(batch, None, heads) if x.ndim == 4 else P(batch, heads)

        outputs = jax.eval_shape(f, *arrays)
        return jax.shard_map(
            f, in_specs=tuple(map(spec, arrays)), out_specs=jax.tree.map(spec, outputs), check_vma=False
        )(*arrays)

    spread = custom_vmap(here)

    @spread.def_vmap
    def mapped(size: int, batched: Any, *arrays: Array) -> Any:
        arrays = tuple(
            (x if has else jnp.broadcast_to(x, (size, *x.shape))).reshape(-1, *x.shape[2 if has else 1 :])
            for x, has in zip(arrays, batched, strict=True)
        )
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), spread(*arrays))
        return out, jax.tree.map(lambda _: True, out)

    return spread


@jax.custom_vjp
def _blockwise(q: Tokens, k: Keys, v: Keys) -> Tokens:
    return _forward(q, k, v)[0]


@_spread
def _forward(q: Tokens, k: Keys, v: Keys) -> tuple[Tokens, Statistics]:
    return _by_platform("forward", _loop_forward)(q, k, v)


@_spread
def _backward(
    q: Tokens, k: Keys, v: Keys, out: Tokens, logsumexp: Statistics, d_out: Tokens
) -> tuple[Tokens, Keys, Keys]:
    return _by_platform("backward", _loop_backward)(q, k, v, out, logsumexp, d_out)


def _by_platform(name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
    """The loop, or the kernel of this name where a TPU's compiler is there; without one, why import and trace it?"""
    kernels = {"cpu": partial(loop, most=CPU_SCORES)}
    if find_spec("libtpu") and not portable.value:
        from jaxdiff.nn import flash

        kernels["tpu"] = getattr(flash, name)
    return partial(jax.lax.platform_dependent, **kernels, default=partial(loop, most=GPU_SCORES))


def _blockwise_fwd(q: Tokens, k: Keys, v: Keys) -> tuple[Tokens, tuple[Array, ...]]:
    out, logsumexp = (checkpoint_name(x, KEPT) for x in _forward(q, k, v))
    return out, (q, k, v, out, logsumexp)


_blockwise.defvjp(_blockwise_fwd, lambda kept, d_out: _backward(*kept, d_out))


# Loops over heads (some at once), blocks of queries, and blocks of keys, so that there are no more than `most` scores
# at a time. They lie as [keys, queries]: sums over keys are then sums of vectors.


def _loop_forward(q: Tokens, k: Keys, v: Keys, *, most: int) -> tuple[Tokens, Statistics]:
    (b, t, h, d), scale = q.shape, q.shape[-1] ** -0.5
    n, queries, keys = _cuts(b * h, t, k.shape[1], d, most)

    def head(arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v = arrays

        def block(q: Array) -> tuple[Array, Array]:
            def step(carry: tuple[Array, ...], part: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
                (top, total, out), (k, v) = carry, part
                scores = _product("gkd,gqd->gkq", k, q) * scale
                new_top = jnp.maximum(top, scores.max(1, keepdims=True))
                weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
                total = total * shrink + weights.sum(1, keepdims=True)
                return (new_top, total, out * shrink + _product("gkd,gkq->gdq", v, weights.astype(v.dtype))), None

            row = jnp.zeros((n, 1, queries))
            start = (row - jnp.inf, row, jnp.zeros((n, d, queries)))
            (top, total, out), _ = jax.lax.scan(step, start, (_cut(k, keys), _cut(v, keys)))
            return (out / total).astype(v.dtype), (top + jnp.log(total))[:, 0]

        out, logsumexp = jax.lax.map(block, _cut(q, queries))
        return out, logsumexp

    out, logsumexp = jax.lax.map(head, tuple(_heads(x, n) for x in (q, k, v)))
    # [heads, blocks, heads at once, ...]
    out = out.transpose(0, 2, 1, 4, 3).reshape(b, h, t, d)
    return jnp.swapaxes(out, 1, 2), logsumexp.swapaxes(1, 2).reshape(b, h, t)


def _loop_backward(
    q: Tokens, k: Keys, v: Keys, out: Tokens, logsumexp: Statistics, d_out: Tokens, *, most: int
) -> tuple[Tokens, Keys, Keys]:
    (b, t, h, d), s, scale = q.shape, k.shape[1], q.shape[-1] ** -0.5
    n, queries, keys = _cuts(b * h, t, s, d, most)
    inner = jnp.einsum("bthd,bthd->bht", out, d_out, preferred_element_type=jnp.float32)

    def head(arrays: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, d_out, logsumexp, inner = arrays

        def block(sums: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            q, d_out, logsumexp, inner = rows

            def step(d_q: Array, part: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
                k, v = part
                weights = jnp.exp(_product("gkd,gqd->gkq", k, q) * scale - logsumexp[:, None])
                d_weights = _product("gkd,gqd->gkq", v, d_out)
                d_scores = (weights * (d_weights - inner[:, None])).astype(q.dtype)
                d_k = _product("gkq,gqd->gkd", d_scores, q)
                d_v = _product("gkq,gqd->gkd", weights.astype(q.dtype), d_out)
                return d_q + _product("gkd,gkq->gdq", k, d_scores), (d_k, d_v)

            d_q, parts = jax.lax.scan(step, jnp.zeros((n, d, queries)), (_cut(k, keys), _cut(v, keys)))
            return jax.tree.map(jnp.add, sums, parts), (d_q * scale).astype(q.dtype)

        zeros = jnp.zeros((s // keys, n, keys, d))
        rows = (_cut(q, queries), _cut(d_out, queries), _cut(logsumexp, queries), _cut(inner, queries))
        (d_k, d_v), d_q = jax.lax.scan(block, (zeros, zeros), rows)
        return d_q, (d_k * scale).astype(k.dtype), d_v.astype(v.dtype)

    arrays = [_heads(x, n) for x in (q, k, v, d_out)] + [x.reshape(-1, n, t) for x in (logsumexp, inner)]
    d_q, d_k, d_v = jax.lax.map(head, tuple(arrays))
    d_q = d_q.transpose(0, 2, 1, 4, 3).reshape(b, h, t, d)
    d_k, d_v = (x.swapaxes(1, 2).reshape(b, h, s, d) for x in (d_k, d_v))
    return jnp.swapaxes(d_q, 1, 2), jnp.swapaxes(d_k, 1, 2), jnp.swapaxes(d_v, 1, 2)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _heads(x: Float[Array, "b t h d"], n: int) -> Float[Array, "m {n} t d"]:
    """Heads first, `n` of them together."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, n, x.shape[1], x.shape[3])


def _cut(x: Float[Array, "n t *d"], rows: int) -> Float[Array, "m n {rows} *d"]:
    """Blocks of so many rows."""
    return x.reshape(len(x), -1, rows, *x.shape[2:]).swapaxes(0, 1)


def _cuts(heads: int, queries: int, keys: int, d: int, most: int) -> tuple[int, int, int]:
    """How many heads, queries and keys meet at a time: equal parts."""
    keys = _part(keys, max(BLOCK_KEYS, BLOCK_NUMBERS // d))
    queries = _part(queries, max(1, most // keys))
    return _part(heads, max(1, most // (keys * queries))), queries, keys


def _part(n: int, most: int) -> int:
    """The largest part of `n` up to `most`; `n` itself where all are small."""
    return next((part for part in range(min(n, most), most // 16, -1) if n % part == 0), n)


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (itself if None), with diffusers' names for the projections.

    `norm_groups` above 0 puts a GroupNorm first, as the autoencoder wants it. Keys and values are taken from the
    collection "prompt" where it holds any (`jaxdiff.models.unet.prompt_keys`); what it holds as `images`, pairs of keys
    and values (`jaxdiff.models.ip_adapter`), is attended to as well, and added. The collection "rows" may say whose
    queries and keys each row takes (`source`), and in which rows each pixel sees itself alone (`identity`).
    """

    heads: int
    qkv_bias: bool = False
    norm_groups: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], context: Context | None = None) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        if self.norm_groups:
            x = GroupNorm(self.norm_groups, 1e-6, self.dtype, name="group_norm")(x)
        context = x if context is None else context

        def project(name: str, source: Array) -> Array:
            y = Dense(c, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(source)
            return y.reshape(b, -1, self.heads, c // self.heads)

        if self.has_variable("prompt", "to_k"):
            k, v = (
                self.get_variable("prompt", name).reshape(b, -1, self.heads, c // self.heads) for name in CONTEXT_KEYS
            )
        else:
            k, v = (project(name, context) for name in CONTEXT_KEYS)
        q = project("to_q", x)
        if self.has_variable("rows", "source"):
            rows = self.get_variable("rows", "source")
            q, k = q[rows], k[rows]
        y = attend(q, k, v)
        if self.has_variable("prompt", "images"):
            for keys, values in self.get_variable("prompt", "images"):
                y += attend(q, *(x.reshape(b, -1, self.heads, c // self.heads) for x in (keys, values)))
        if self.has_variable("rows", "identity"):
            y = jnp.where(self.get_variable("rows", "identity")[:, None, None, None], v, y)
        return Dense(c, dtype=self.dtype, name="to_out_0")(y.reshape(b, t, c))


class GEGLU(nn.Module):
    """A dense layer of which one half gates the other by GELU (Shazeer 2020, eq. 6)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t {self.features}"]:
        x, gate = jnp.split(Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return _gated(x, gate)


@recomputed
def _gated(x: Float[Array, "b t c"], gate: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
    return x * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        wide, narrow = GEGLU(4 * c, self.dtype, name="net_0"), Dense(c, dtype=self.dtype, name="net_2")
        tokens = t if b * t * 8 * c <= WIDE else _part(t, WIDE // (16 * b * c))
        if self.is_initializing() or self.dtype != jnp.float32 or tokens == t:
            return narrow(wide(x))

        def net(params: Params, x: Array) -> Any:
            h = wide.clone(parent=None).apply({"params": params["net_0"]}, x)
            return narrow.clone(parent=None).apply({"params": params["net_2"]}, h)

        return _in_parts(net, tokens)(dict(self.variables["params"]), x)


WIDE = 2**23
"""Numbers between the layers of a feed-forward network: more are worked on in parts on a CPU, of half as many at most.

They stay in its cache then: 4096 tokens of 320 channels take 65 ms in place of 91 (two cores, 32 MB), 8192 take 135 in
place of 189.
"""


def _in_parts(net: Callable[[Params, Array], Array], tokens: int) -> Callable[[Params, Array], Array]:
    """`net`, on a CPU of so many tokens at a time. Where gradients are wanted all is computed at once, and kept."""

    @jax.custom_vjp
    def whole(params: Params, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        def on_cpu(params: Params, x: Array) -> Array:
            parts = jnp.moveaxis(x.reshape(len(x), -1, tokens, x.shape[-1]), 1, 0)
            return jnp.moveaxis(jax.lax.map(partial(net, params), parts), 0, 1).reshape(x.shape)

        return jax.lax.platform_dependent(params, x, cpu=on_cpu, default=net)

    whole.defvjp(lambda params, x: jax.vjp(net, params, x), lambda pull, d_y: pull(d_y))
    return whole


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention on the prompt, feed-forward; each behind a norm, each added.

    With `only_context` the first attends to the prompt, as the second does.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    only_context: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"], context: Context) -> Float[Array, "b t c"]:
        x += Attention(self.heads, dtype=self.dtype, name="attn1")(
            LayerNorm(dtype=self.dtype, name="norm1")(x), context if self.only_context else None
        )
        x += Attention(self.heads, dtype=self.dtype, name="attn2")(
            LayerNorm(dtype=self.dtype, name="norm2")(x), context
        )
        return x + FeedForward(self.dtype, name="ff")(LayerNorm(dtype=self.dtype, name="norm3")(x))


class Transformer2D(nn.Module):
    """A stack of transformer blocks over the pixels of a feature map (Rombach et al. 2022, section 3.3 and B)."""

    depth: int
    heads: int
    groups: int
    linear_projection: bool
    dtype: DTypeLike = jnp.float32
    only_context: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Context) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        if self.linear_projection:
            y = Dense(c, dtype=self.dtype, name="proj_in")(y.reshape(b, h * w, c))
        else:
            y = Conv1x1(c, dtype=self.dtype, name="proj_in")(y).reshape(b, h * w, c)
        for i in range(self.depth):
            block = BasicTransformerBlock(self.heads, self.dtype, self.only_context, name=f"transformer_blocks_{i}")
            y = block(y, context)
        if self.linear_projection:
            y = Dense(c, dtype=self.dtype, name="proj_out")(y).reshape(b, h, w, c)
        else:
            y = Conv1x1(c, dtype=self.dtype, name="proj_out")(y.reshape(b, h, w, c))
        return x + y
