"""Attention on TPUs: scores never leave the chip (Dao 2023, FlashAttention-2, algorithms 1 and 2).

The kernels read and write [tokens, heads x features], as the projections have it: a head of 40 features by itself would
take the room of 128 in memory, and a transposition there and back. A head is found in the lanes that hold it, the
neighbours' set to 0 in one factor. Scores are kept as [keys, queries], so that sums over keys are sums of registers.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
KEYS = 512
"""Keys that meet a block of queries at a time."""
QUERIES = 512
QUERY_BYTES = 400 * 1024
"""Of one block of queries; and of keys or values, whether all of them (without a second buffer) or a block."""
KEY_BYTES = 3200 * 1024
GRADIENT_KEY_BYTES = 9 * 1024**2
"""Of a block of keys, of values, of their gradients and the sums of these. All this is for 16 MiB, a v4's memory."""

Tokens = Float[Array, "b t h d"]
Statistics = Float[Array, "b h t"]


def forward(q: Tokens, k: Float[Array, "b s h d"], v: Float[Array, "b s h d"]) -> tuple[Tokens, Statistics]:
    """Attention, and the logarithm of each query's sum of exponentials."""
    call = _Call(q, k, key_bytes=2 * q.dtype.itemsize, key_limit=2 * KEY_BYTES)
    out, logsumexp = call(
        _forward, "attention", products=2, inputs="qkk", outputs="qs",
        scratch=[(call.heads, call.rows), (call.heads, call.rows), (call.width, call.rows)],
    )(call.flat(q), call.keys(k), call.keys(v))  # fmt: skip
    return out.reshape(q.shape), logsumexp


def backward(
    q: Tokens,
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    out: Tokens,
    logsumexp: Statistics,
    d_out: Tokens,
) -> tuple[Tokens, Float[Array, "b s h d"], Float[Array, "b s h d"]]:
    """The gradients of q, k and v: one pass over keys for each block of queries, one the other way round."""
    size = q.dtype.itemsize
    call = _Call(q, k, key_bytes=2 * size, key_limit=2 * KEY_BYTES, most=KEYS // 2)
    arrays = call.flat(q), call.keys(k), call.keys(v)
    d_q, inner = call(
        _d_queries, "attention_dq", products=3, inputs="qkkqqs", outputs="qs", scratch=[(call.width, call.rows)]
    )(*arrays, call.flat(out), call.flat(d_out), logsumexp)

    call = _Call(q, k, key_bytes=8 * size + 8, key_limit=GRADIENT_KEY_BYTES, most=KEYS // 2, keys_first=True)
    arrays = call.flat(q), call.keys(k), call.keys(v)
    d_k, d_v = call(
        _d_keys, "attention_dkv", products=4, inputs="qkkqss", outputs="kk", scratch=[(call.block, call.width)] * 2
    )(*arrays, call.flat(d_out), logsumexp, inner)
    return d_q.reshape(q.shape), *(x[:, : k.shape[1]].reshape(k.shape) for x in (d_k, d_v))


class _Call:
    """How queries and keys are cut, and a kernel that is called on the blocks."""

    def __init__(
        self, q: Array, k: Array, *, key_bytes: int, key_limit: int, most: int = KEYS, keys_first: bool = False
    ) -> None:
        (self.batch, self.queries, self.heads, self.features), self.dtype = q.shape, q.dtype
        self.width, self.n_keys, self.keys_first = self.heads * self.features, k.shape[1], keys_first
        padded = -(-self.width // LANES) * LANES
        # Rows: all of them, or whole lanes of the statistics.
        limit = max(LANES, QUERY_BYTES // (padded * q.dtype.itemsize) // LANES * LANES)
        self.rows = min(self.queries, limit, QUERIES)
        # Keys: a few at a time, in equal parts where that can be; as many of these in a block as there is room for.
        self.few = _part(self.n_keys, most)
        parts = -(-self.n_keys // self.few)
        room = max(1, key_limit // (self.few * padded * key_bytes))
        self.block = self.few * max(n for n in range(1, parts + 1) if parts % n == 0 and n <= room)
        self.blocks = -(-self.n_keys // self.block)

    def flat(self, x: Array) -> Array:
        """[b, tokens, heads x features]: no more than another name of what a projection returned."""
        return x.reshape(*x.shape[:2], self.width)

    def keys(self, x: Array) -> Array:
        return jnp.pad(self.flat(x), ((0, 0), (0, self.blocks * self.block - self.n_keys), (0, 0)))

    def __call__(
        self, kernel: Any, name: str, *, products: int, inputs: str, outputs: str, scratch: list[tuple[int, int]]
    ) -> Any:
        """The kernel with blocks of q(ueries), k(eys) and s(tatistics) as `inputs` and `outputs` name them."""
        q_blocks, order = pl.cdiv(self.queries, self.rows), (lambda q, k: (k, q)) if self.keys_first else lambda *x: x

        def query(b: Any, *at: Any) -> Any:
            return b, order(*at)[0], 0

        def statistic(b: Any, *at: Any) -> Any:
            return b, 0, order(*at)[0]

        def key(b: Any, *at: Any) -> Any:
            return b, order(*at)[1], 0

        once = pl.Buffered(1) if self.blocks == 1 and not self.keys_first else None
        specs = {
            "q": pl.BlockSpec((None, self.rows, self.width), query),
            "k": pl.BlockSpec((None, self.block, self.width), key, pipeline_mode=once),
            "s": pl.BlockSpec((None, self.heads, self.rows), statistic),
        }
        shapes = {
            "q": jax.ShapeDtypeStruct((self.batch, self.queries, self.width), self.dtype),
            "k": jax.ShapeDtypeStruct((self.batch, self.blocks * self.block, self.width), self.dtype),
            "s": jax.ShapeDtypeStruct((self.batch, self.heads, self.queries), jnp.float32),
        }
        # What the inner loop walks along is read again for each turn of the outer one.
        again = {"k": 1 if self.keys_first or self.blocks == 1 else q_blocks}
        again |= dict.fromkeys("qs", self.blocks if self.keys_first else 1)
        scores = self.batch * self.heads * self.queries * self.n_keys
        cost = pl.CostEstimate(
            flops=2 * products * scores * self.features,
            transcendentals=scores,
            bytes_accessed=sum(again[x] * _bytes(shapes[x]) for x in inputs) + sum(_bytes(shapes[x]) for x in outputs),
        )
        return pl.pallas_call(
            partial(kernel, self),
            grid=(self.batch, *order(q_blocks, self.blocks)),
            in_specs=[specs[x] for x in inputs],
            out_specs=[specs[x] for x in outputs],
            out_shape=[shapes[x] for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=cost,
            name=name,
        )

    def each_head(self) -> Any:
        """(number, its lanes in a whole number of tiles, where it begins in these, its own lanes)."""
        d = self.features
        for h in range(self.heads):
            first = h * d // LANES * LANES
            last = min(self.width, -(-(h + 1) * d // LANES) * LANES)
            yield h, slice(first, last), h * d - first, slice(h * d, (h + 1) * d)

    def alone(self, x: Array, start: int, rows_left: Any = None) -> Array:
        """`x` with the lanes of other heads 0; rows past the last query, which hold anything, too."""
        lanes = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) - start
        own = (lanes >= 0) & (lanes < self.features)
        if rows_left is not None:
            own &= jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < rows_left
        return jnp.where(own, x, jnp.zeros_like(x))

    def few_keys(self, step: Any, carry: Any) -> Any:
        """`step(rows, first, carry)` for the rows of a few keys after the other; `first` is the first of them."""
        count, few = self.block // self.few, self.few
        if count == 1:
            return step(slice(None), 0, carry)

        def turn(i: Any, carry: Any) -> Any:
            return step(pl.ds(pl.multiple_of(i * few, few), few), i * few, carry)

        return jax.lax.fori_loop(0, count, turn, carry)

    def scores(self, keys: Array, q: Array, first: Any) -> Array:
        """[keys, queries]; -inf for keys that only fill up the last block, the first of these being `first`."""
        scores = _product(keys, q, 1, 1) * self.features**-0.5
        if self.n_keys % self.block:
            at = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) + first
            scores = jnp.where(at < self.n_keys, scores, -jnp.inf)
        return scores


def _part(n: int, most: int) -> int:
    """`n`, or the largest part of it in tiles of 16 up to `most`, or what leaves the least to fill up."""
    if n <= most:
        return n
    equal = [part for part in range(most, most // 2 - 1, -16) if n % part == 0]
    return equal[0] if equal else -(-n // -(-n // most) // 16) * 16


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _forward(call: _Call, q_ref, k_ref, v_ref, out_ref, logsumexp_ref, top_ref, total_ref, sum_ref) -> None:
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        top_ref[...] = jnp.full(top_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    for h, tiles, start, own in call.each_head():
        q = call.alone(q_ref[:, tiles], start)

        def step(rows, first, carry, q=q, tiles=tiles, start=start):
            top, total, out = carry
            scores = call.scores(k_ref[rows, tiles], q, block * call.block + first)
            new_top = jnp.maximum(top, scores.max(0, keepdims=True))
            weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            part = _product(v_ref[rows, tiles], weights.astype(v_ref.dtype), 0, 0)[start : start + call.features]
            return new_top, total * shrink + weights.sum(0, keepdims=True), out * shrink + part

        refs = (top_ref, slice(h, h + 1)), (total_ref, slice(h, h + 1)), (sum_ref, own)
        for (ref, at), x in zip(refs, call.few_keys(step, tuple(ref[at] for ref, at in refs)), strict=True):
            ref[at] = x

    @pl.when(block == call.blocks - 1)
    def _() -> None:
        for h, _, _, own in call.each_head():
            sum_ref[own] /= total_ref[h : h + 1]
        out_ref[...] = sum_ref[...].T.astype(out_ref.dtype)
        logsumexp_ref[...] = top_ref[...] + jnp.log(total_ref[...])


def _d_queries(
    call: _Call, q_ref, k_ref, v_ref, out_ref, d_out_ref, logsumexp_ref, d_q_ref, inner_ref, sum_ref
) -> None:
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        products = (out_ref[...].astype(jnp.float32) * d_out_ref[...].astype(jnp.float32)).T
        for h, _, _, own in call.each_head():
            inner_ref[h : h + 1] = products[own].sum(0, keepdims=True)

    for h, tiles, start, own in call.each_head():
        q, d_out = (call.alone(ref[:, tiles], start) for ref in (q_ref, d_out_ref))

        def step(rows, first, sum_, h=h, q=q, d_out=d_out, tiles=tiles, start=start):
            keys = k_ref[rows, tiles]
            weights = jnp.exp(call.scores(keys, q, block * call.block + first) - logsumexp_ref[h : h + 1])
            d_weights = _product(v_ref[rows, tiles], d_out, 1, 1)
            d_scores = (weights * (d_weights - inner_ref[h : h + 1])).astype(q.dtype)
            return sum_ + _product(keys, d_scores, 0, 0)[start : start + call.features]

        sum_ref[own] = call.few_keys(step, sum_ref[own])

    @pl.when(block == call.blocks - 1)
    def _() -> None:
        d_q_ref[...] = (sum_ref[...] * call.features**-0.5).T.astype(d_q_ref.dtype)


def _d_keys(
    call: _Call, q_ref, k_ref, v_ref, d_out_ref, logsumexp_ref, inner_ref, d_k_ref, d_v_ref, d_k_sum, d_v_sum
) -> None:
    block = pl.program_id(2)
    left = call.queries - block * call.rows if call.queries % call.rows else None

    @pl.when(block == 0)
    def _() -> None:
        d_k_sum[...] = jnp.zeros(d_k_sum.shape, jnp.float32)
        d_v_sum[...] = jnp.zeros(d_v_sum.shape, jnp.float32)

    for h, tiles, start, _ in call.each_head():
        q, d_out = (call.alone(ref[:, tiles], start, left) for ref in (q_ref, d_out_ref))
        logsumexp, inner = logsumexp_ref[h : h + 1], inner_ref[h : h + 1]
        if left is not None:
            there = jax.lax.broadcasted_iota(jnp.int32, inner.shape, 1) < left
            logsumexp, inner = jnp.where(there, logsumexp, jnp.inf), jnp.where(there, inner, 0.0)

        def step(rows, _, carry, q=q, d_out=d_out, tiles=tiles, logsumexp=logsumexp, inner=inner):
            weights = jnp.exp(_product(k_ref[rows, tiles], q, 1, 1) * call.features**-0.5 - logsumexp)
            d_weights = _product(v_ref[rows, tiles], d_out, 1, 1)
            d_scores = (weights * (d_weights - inner)).astype(q.dtype)
            d_k_sum[rows, tiles] += _product(d_scores, q, 1, 0)
            d_v_sum[rows, tiles] += _product(weights.astype(q.dtype), d_out, 1, 0)
            return carry

        call.few_keys(step, 0)

    @pl.when(block == pl.num_programs(2) - 1)
    def _() -> None:
        d_k_ref[...] = (d_k_sum[...] * call.features**-0.5).astype(d_k_ref.dtype)
        d_v_ref[...] = d_v_sum[...].astype(d_v_ref.dtype)
