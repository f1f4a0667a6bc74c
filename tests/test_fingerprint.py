"""Checksums: one number for the same array wherever it lies, and another for any other array."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.io.fingerprint import fingerprints
from jaxdiff.runtime.mesh import make_mesh


def of(array: object) -> str:
    return fingerprints({"a": array})[0]["a"]


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def by_numpy(array: np.ndarray) -> str:
    bits = array.reshape(-1)
    if array.dtype.kind not in "iub":
        bits = bits.view(f"uint{8 * array.dtype.itemsize}")
    bits = bits.astype(np.uint32)
    place = mix(np.arange(len(bits), dtype=np.uint32) + np.uint32(0x9E3779B9))
    sums = mix(bits ^ place), mix((bits + place) * np.uint32(0xC2B2AE3D))
    return "".join(f"{int(part.sum(dtype=np.uint32)):08x}" for part in sums)


ARRAYS = {
    "float32": np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32),
    "bfloat16": np.random.default_rng(1).normal(size=(8, 16)).astype(ml_dtypes.bfloat16),
    "float8": np.random.default_rng(2).normal(size=(33,)).astype(ml_dtypes.float8_e4m3fn),
    "int8": np.arange(-20, 20, dtype=np.int8),
    "uint32": np.asarray([0, 1, 2**32 - 1], np.uint32),
    "bool": np.asarray([[True, False], [False, False]]),
    "scalar": np.asarray(7, np.int32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_a_checksum_is_that_of_a_plain_numpy_computation(array: np.ndarray) -> None:
    assert of(jnp.asarray(array)) == of(array) == by_numpy(array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checksum_does_not_depend_on_where_an_array_is_split(dtype: str) -> None:
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 24)) * 10, dtype)
    expected = of(array)
    few = make_mesh(2, 2, 1, jax.devices()[:4])
    for mesh, *specs in (
        (make_mesh(2, 2, 2), P(None, ("data", "fsdp"), "tensor"), P("tensor"), P()),
        (make_mesh(1, 8, 1), P("fsdp"), P(None, None, "fsdp")),
        (few, P("data", "fsdp")),
    ):
        for spec in specs:
            assert of(jax.device_put(array, NamedSharding(mesh, spec))) == expected


def test_every_single_bit_changes_the_checksum() -> None:
    array = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    seen = {of(array)}
    for byte in range(array.nbytes):
        for bit in range(8):
            flipped = array.copy()
            flipped.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
            seen.add(of(flipped))
    assert len(seen) == 1 + 8 * array.nbytes


def test_elements_in_another_order_have_another_checksum() -> None:
    array = np.arange(40, dtype=np.float32)
    seen = {of(array), of(array[::-1].copy()), of(np.roll(array, 1))}
    for i in range(39):
        swapped = array.copy()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        seen.add(of(swapped))
    assert len(seen) == 3 + 39


def test_leaves_that_are_not_finite_are_named() -> None:
    tree = {
        "good": jnp.ones(3),
        "nan": {"kernel": jnp.asarray([1, jnp.nan])},
        "inf": jnp.asarray([[-jnp.inf]], jnp.bfloat16),
        "step": jnp.asarray(3),
    }
    assert fingerprints(tree)[1] == ["inf", "nan/kernel"]


@pytest.mark.parametrize("leaf", [jax.random.key(0), np.zeros(3), jnp.zeros(2, jnp.complex64)], ids=str)
def test_what_has_no_plain_bits_is_refused(leaf: object) -> None:
    with pytest.raises(ValueError, match=r"part/leaf has the dtype .*, of which no checksum is made"):
        fingerprints({"part": {"leaf": leaf}})
