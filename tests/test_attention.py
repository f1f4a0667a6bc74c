"""Attention in blocks is attention, whichever kernel computes it; it only keeps less."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.nn import attention, flash
from jaxdiff.nn.attention import FeedForward, _blockwise, _dense, attend
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.tools import hlo

# batch, queries, keys, heads, features: equal blocks; lengths that have none; few keys; few queries; several blocks of
# keys; and heads that lie across a TPU's tiles of 128 lanes.
SHAPES = ((2, 512, 512, 2, 8), (1, 517, 389, 3, 5), (2, 300, 77, 2, 8), (1, 33, 600, 1, 16), (1, 128, 2048, 2, 8))
TILES = ((1, 640, 1040, 8, 40), (1, 300, 523, 3, 80))


def quick(*cases: object, first: int = 1) -> list[object]:
    """The cases, of which all after the first ones are slow."""
    values = [case if isinstance(case, tuple) and isinstance(case[0], tuple) else (case,) for case in cases]
    return [pytest.param(*one, marks=[pytest.mark.slow] * (i >= first)) for i, one in enumerate(values)]


def inputs(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    b, q, k, h, d = shape
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (q, k, k, q)
    return [jax.random.normal(key, (b, t, h, d), dtype) for key, t in zip(keys, lengths, strict=True)]


def output_and_gradients(f, q, k, v, d_out):
    out, pull = jax.vjp(f, q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *pull(d_out))]


def tpu_kernels(q, k, v, d_out):
    with pltpu.force_tpu_interpret_mode():
        out, logsumexp = flash.forward(q, k, v)
        gradients = flash.backward(q, k, v, out, logsumexp, d_out)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def relative_errors(found, wanted):
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize(
    ("shape", "most"), quick(*((shape, most) for most in (2**19, 2**14, 2**24) for shape in reversed(SHAPES)), first=2)
)
def test_loops_give_the_output_and_the_gradients_of_the_whole(
    shape: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_NUMBERS", most // 8)  # several blocks of keys, and one
    arrays = inputs(shape)
    out, logsumexp = attention._loop_forward(*arrays[:3], most=most)
    gradients = attention._loop_backward(*arrays[:3], out, logsumexp, arrays[3], most=most)
    assert max(relative_errors((out, *gradients), output_and_gradients(_dense, *arrays))) < 1e-5


def test_a_wide_layer_in_parts_is_the_whole_and_so_are_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FeedForward()
    x, d_y = (jax.random.normal(jax.random.key(i), (2, 60, 8)) for i in range(2))
    params = network.init(jax.random.key(2), x)

    def program():
        return jax.jit(lambda params, x: network.apply(params, x))  # traced anew

    def all_of_it(params, x, d_y):
        y, pull = jax.vjp(program(), params, x)
        return [np.asarray(leaf) for leaf in jax.tree.leaves((y, *pull(d_y)))]

    wanted, at_once = all_of_it(params, x, d_y), program().lower(params, x).as_text()
    monkeypatch.setattr(attention, "WIDE", 2 * 16 * 8 * 15)
    assert (at_once.count("stablehlo.while"), program().lower(params, x).as_text().count("stablehlo.while")) == (0, 1)
    assert program().trace(params, x).lower(lowering_platforms=("tpu",)).as_text().count("stablehlo.while") == 0
    np.testing.assert_allclose(program()(params, x), wanted[0], rtol=1e-5, atol=1e-6)
    assert max(relative_errors(all_of_it(params, x, d_y), wanted)) < 1e-5


@pytest.mark.parametrize("shape", quick(SHAPES[3], *SHAPES[:3], *SHAPES[4:], *TILES))
def test_a_tpus_kernels_give_the_output_and_the_gradients_of_the_whole(shape: tuple[int, ...]) -> None:
    arrays = inputs(shape)
    assert max(relative_errors(tpu_kernels(*arrays), output_and_gradients(_dense, *arrays))) < 1e-5


def test_a_tpus_kernels_take_keys_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("KEY_BYTES", "GRADIENT_KEY_BYTES"):
        monkeypatch.setattr(flash, limit, 1)
    arrays = inputs((1, 33, 1061, 1, 40))
    assert max(relative_errors(tpu_kernels(*arrays), output_and_gradients(_dense, *arrays))) < 1e-5


@pytest.mark.parametrize("blocks", quick(lambda *arrays: output_and_gradients(_blockwise, *arrays), tpu_kernels))
def test_blocks_in_bfloat16_are_as_near_to_the_truth_as_the_whole_is(blocks) -> None:
    arrays = inputs(SHAPES[1], jnp.bfloat16)
    truth = output_and_gradients(_dense, *(x.astype(jnp.float32) for x in arrays))
    found = relative_errors(blocks(*arrays), truth)
    assert max(found) < 0.01
    assert max(found) < 2 * max(relative_errors(output_and_gradients(_dense, *arrays), truth))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 512, 512, 8, 40), (2, 512, 77, 4, 64)])
def test_cudnn_in_bfloat16_is_as_near_to_the_truth_as_the_whole_is(shape: tuple[int, ...]) -> None:
    arrays = inputs(shape, jnp.bfloat16)
    assert "cudnn" in jax.jit(attend).lower(*arrays[:3]).as_text()
    truth = output_and_gradients(_dense, *(x.astype(jnp.float32) for x in arrays))
    found = relative_errors(output_and_gradients(attend, *arrays), truth)
    assert max(found) < 2 * max(relative_errors(output_and_gradients(_dense, *arrays), truth))


def test_the_backward_pass_keeps_no_scores() -> None:
    def kept(t: int) -> int:
        _, pull = jax.vjp(attend, *inputs((1, t, t, 2, 8))[:3])
        return sum(x.size for x in jax.tree.leaves(pull))

    assert kept(1024) / kept(512) == pytest.approx(2, abs=0.05)
    assert kept(128) / kept(64) > 2.5  # where there are few, they are kept


def test_a_mask_says_what_is_seen() -> None:
    q, k, v, _ = inputs((1, 130, 130, 2, 8))
    seen = attend(q, k, v, jnp.tril(jnp.ones((130, 130), bool)))
    np.testing.assert_allclose(seen[:, :70], attend(q, k, v, jnp.tril(jnp.ones((130, 130), bool), 0))[:, :70])
    for t in (0, 69, 129):
        np.testing.assert_allclose(seen[:, t], attend(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])[:, 0], atol=1e-5)


def test_operations_are_counted_alike_in_loops_and_kernels() -> None:
    b, t, s, h, d = shape = (2, 300, 77, 2, 8)
    q, k, v, _ = inputs(shape)
    for f in (lambda *x: attention._loop_forward(*x, most=2**19), flash.forward, attend):
        assert hlo.flops(jax.make_jaxpr(f)(q, k, v)) == 4 * b * t * s * h * d
    with jax.set_mesh(make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])):
        assert hlo.flops(jax.make_jaxpr(attend)(q, k, v)) == 4 * b * t * s * h * d


def test_a_mesh_splits_batch_and_heads_and_nothing_travels() -> None:
    arrays = inputs((4, 300, 300, 2, 8))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = jax.device_put(arrays, NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")))

    def f(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    with jax.set_mesh(mesh):
        program = jax.jit(f).lower(*spread).compile()
        mapped = jax.jit(jax.vmap(lambda *x: attend(*(y[None] for y in x))[0])).lower(*spread[:3]).compile()
    assert hlo.parse(program.as_text()).collectives() == {}
    assert hlo.parse(mapped.as_text()).collectives() == {}
    for found, wanted in zip(program(*spread), f(*arrays), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mapped(*spread[:3]), program(*spread)[0], rtol=1e-5, atol=1e-6)


def test_a_mesh_that_does_not_divide_batch_and_heads_computes_the_same() -> None:
    q, k, v, _ = inputs((3, 300, 300, 1, 8))
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        found = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(found, attend(q, k, v), rtol=1e-5, atol=1e-6)


def test_attention_can_be_mapped_over_images() -> None:
    q, k, v, _ = inputs((3, 300, 300, 2, 8))
    mapped = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])(q, k, v)
    np.testing.assert_allclose(mapped, attend(q, k, v), rtol=1e-5, atol=1e-6)
    same_keys = jax.vmap(lambda q: attend(q[None], k[:1], v[:1])[0])(q)
    np.testing.assert_allclose(same_keys[2], attend(q[2:], k[:1], v[:1])[0], rtol=1e-5, atol=1e-6)


COMPILE = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxdiff.nn.attention import attend
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.tools import hlo
from jaxdiff.tools.plan import tpu_devices
mesh = make_mesh(data=2, fsdp=2, tensor=2, devices=tpu_devices("v5e:2x4"))
def f(q, k, v, d_out):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)
def mapped(q, k, v, _):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.vmap(attend)(*(x.reshape(-1, 2, *x.shape[1:]) for x in (q, k, v)))
for t, s, h, d in ((4096, 4096, 8, 40), (1024, 77, 8, 80), (256, 256, 8, 160), (9216, 9216, 10, 64)):
    place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    arrays = [jax.ShapeDtypeStruct((8, n, h, d), jnp.bfloat16, sharding=place) for n in (t, s, s, t)]
    for program, kernels in ((f, 3), (mapped, 1)):
        compiled = jax.jit(program).lower(*arrays).compile()
        parsed = hlo.parse(compiled.as_text())
        calls = [i for body in parsed.computations.values() for i in body if "tpu_custom_call" in i.rest]
        assert (len(calls), parsed.collectives()) == (kernels, {}), (t, s, h, d, calls, parsed.collectives())
        assert compiled.memory_analysis().temp_size_in_bytes < 1e6
"""


@pytest.mark.tpu_compile
def test_the_tpu_compiler_takes_the_kernels_on_a_mesh_and_nothing_travels_nor_is_kept() -> None:
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": "v5litepod-16", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=Path(__file__).parents[1], env=os.environ | settings,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
