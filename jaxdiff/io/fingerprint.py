"""Checksums of arrays, computed where the arrays are: the same number on one device and on a pod."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.runtime.mesh import path_name


def fingerprints(tree: Any) -> tuple[dict[str, str], list[str]]:
    """A checksum of 64 bits, as 16 hexadecimal digits, of every leaf by its path; and the leaves that are not finite.

    Each element's bits are mixed with its flat index by a bijection of the 32-bit numbers, and the results are summed
    modulo 2^32; twice, with other constants. So a change of one element always shows, one of several is missed once in
    2^64, and where the array is split does not matter. Every array is read once. Of several processes all must call it.

    Raises:
        ValueError: where a leaf is of a type that has no plain bits.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not _has_plain_bits(leaf.dtype):
            raise ValueError(f"{name} has the dtype {leaf.dtype}, of which no checksum is made: keep real numbers of "
                             "the widths that JAX is set to, and jax.random.key_data of a typed key.")  # fmt: skip
    found = jax.device_get([_fingerprint(leaf, _everywhere(leaf)) for leaf in leaves.values()])
    sums = {name: f"{first:08x}{second:08x}" for name, (first, second, _) in zip(leaves, found, strict=True)}
    return sums, [name for name, (_, _, finite) in zip(leaves, found, strict=True) if not finite]


def _has_plain_bits(dtype: Any) -> bool:
    if jnp.issubdtype(dtype, jax.dtypes.extended) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return False
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))


def _everywhere(leaf: Any) -> NamedSharding | None:
    """Where every process can read a result."""
    sharding = getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None


@partial(jax.jit, static_argnums=1)
def _fingerprint(x: jax.Array, everywhere: NamedSharding | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two sums of 32 bits, and whether all is finite."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    finite = jnp.isfinite(x) if floating else jnp.ones(x.shape, bool)
    if floating or x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, f"uint{min(32, x.dtype.itemsize * 8)}")
    if x.ndim > finite.ndim:  # two halves of 64 bits each
        finite = jnp.broadcast_to(finite[..., None], x.shape)
    bits = x.astype(jnp.uint32)

    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)

    place = _mix(index + jnp.uint32(0x9E3779B9))
    first, second = _mix(bits ^ place), _mix((bits + place) * jnp.uint32(0xC2B2AE3D))
    # One reduction, not three: on CPU it is ten times as fast, since nothing is written in between.
    zero = jnp.uint32(0)
    result = jax.lax.reduce(
        (first, second, finite),
        (zero, zero, True),
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] & b[2]),
        tuple(range(bits.ndim)),
    )
    return result if everywhere is None else jax.lax.with_sharding_constraint(result, everywhere)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of the 32-bit numbers in which every bit depends on every bit (MurmurHash3's last step; Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
