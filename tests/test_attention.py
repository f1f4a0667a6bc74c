"""Attention in blocks is attention; it only keeps less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.nn.attention import _blockwise, _dense, attend
from jaxdiff.sharding import make_mesh
from jaxdiff.tools import hlo

# batch, queries, keys, heads, features: whole blocks; blocks that do not fill; few keys (one block); fewer than a block
SHAPES = ((2, 512, 512, 2, 8), (1, 517, 389, 3, 5), (2, 300, 77, 2, 8), (1, 33, 600, 1, 16))


def inputs(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    b, q, k, h, d = shape
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (q, k, k, q)
    return [jax.random.normal(key, (b, t, h, d), dtype) for key, t in zip(keys, lengths, strict=True)]


def output_and_gradients(f, q, k, v, d_out, mask=None):
    out, pull = jax.vjp(lambda q, k, v: f(q, k, v, mask), q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *pull(d_out))]


def relative_errors(found, wanted):
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_give_the_output_and_the_gradients_of_the_whole(shape: tuple[int, ...], masked: bool) -> None:
    arrays = inputs(shape)
    mask = jnp.tril(jnp.ones(shape[1:3], bool), shape[2] // 3) if masked else None
    found, wanted = (output_and_gradients(f, *arrays, mask) for f in (_blockwise, _dense))
    assert max(relative_errors(found, wanted)) < 1e-5


def test_blocks_in_bfloat16_are_as_near_to_the_truth_as_the_whole_is() -> None:
    shape = SHAPES[1]
    truth = output_and_gradients(_dense, *(x.astype(jnp.float32) for x in inputs(shape, jnp.bfloat16)))
    blocks, whole = (
        relative_errors(output_and_gradients(f, *inputs(shape, jnp.bfloat16)), truth) for f in (_blockwise, _dense)
    )
    assert max(blocks) < 0.01
    assert max(blocks) < 2 * max(whole)


def test_the_backward_pass_keeps_no_scores() -> None:
    def kept(t: int) -> int:
        _, pull = jax.vjp(attend, *inputs((1, t, t, 2, 8))[:3])
        return sum(x.size for x in jax.tree.leaves(pull))

    assert kept(1024) / kept(512) == pytest.approx(2, abs=0.05)
    assert kept(128) / kept(64) > 2.5  # where there are few, they are kept


def test_a_mesh_splits_batch_and_heads_and_nothing_travels() -> None:
    arrays = inputs((4, 300, 300, 2, 8))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = jax.device_put(arrays, NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")))

    def f(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    program = jax.jit(f).lower(*spread).compile()
    assert hlo.parse(program.as_text()).collectives() == {}
    for found, wanted in zip(program(*spread), f(*arrays), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_attention_can_be_mapped_over_images() -> None:
    q, k, v, _ = inputs((3, 300, 300, 2, 8))
    mapped = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])(q, k, v)
    np.testing.assert_allclose(mapped, attend(q, k, v), rtol=1e-5, atol=1e-6)
