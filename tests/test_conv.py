"""Winograd's convolution is XLA's; the network does not notice which it has."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff import build
from jaxdiff.config import UNetConfig
from jaxdiff.generation.weights import by_module
from jaxdiff.nn import conv
from jaxdiff.nn.conv import Conv3x3, conv3x3, prepare, transform_kernel, winograd
from jaxdiff.runtime.mesh import make_mesh
from jaxdiff.tools import hlo

ROUND = ((1, 1), (1, 1))
# batch, height, width, channels in and out, and the padding
CASES = {
    "whole tiles": ((2, 8, 8, 24, 16), ROUND),
    "odd sides": ((1, 7, 13, 8, 5), ROUND),
    "smaller than a tile": ((3, 1, 2, 8, 8), ROUND),
    "right and bottom only": ((2, 9, 6, 8, 8), ((0, 1), (0, 1))),
    "none at all": ((1, 6, 9, 8, 8), ((0, 0), (0, 0))),
    "many tiles": ((1, 26, 26, 8, 8), ROUND),
}


def plain(x, kernel, padding=ROUND, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def inputs(b, h, w, c, c2, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (b, h, w, c)), jax.random.normal(keys[1], (3, 3, c, c2)) / np.sqrt(9 * c)


def relative_error(found, wanted):
    found, wanted = (np.asarray(v, np.float64) for v in (found, wanted))
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_convolve_exactly(m):
    B, G, A = conv._matrices(m)
    rng = np.random.default_rng(0)
    d, g = rng.normal(size=m + 2), rng.normal(size=3)
    np.testing.assert_allclose(A @ ((G @ g) * (B @ d)), np.correlate(d, g), rtol=1e-12)
    for exact in (A, B):
        np.testing.assert_array_equal(exact, exact.astype(np.float32))


@pytest.mark.parametrize(("case", "m"), [
    *((case, 2) for case in CASES), ("odd sides", 4),
    *(pytest.param(case, 4, marks=pytest.mark.slow) for case in CASES if case != "odd sides"),
])  # fmt: skip
def test_winograd_is_the_convolution(case, m):
    shape, padding = CASES[case]
    x, kernel = inputs(*shape)
    found = jax.jit(lambda x, kernel: winograd(x, transform_kernel(kernel, m), padding=padding))(x, kernel)
    assert relative_error(found, plain(x, kernel, padding)) < 1e-5


LARGE = (4, 12, 14, 64, 64)
"""Enough pixels and channels for `conv3x3` to choose Winograd."""


def output_and_gradients(f, x, kernel):
    y, pull = jax.vjp(f, x, kernel)
    return y, *pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@pytest.mark.parametrize("padding", [ROUND, ((0, 1), (0, 1))])
def test_gradients_are_those_of_the_convolution(padding):
    x, kernel = inputs(*LARGE)
    assert conv.tile(x.shape[0] * 11 * 13, 64, 64)
    found = jax.jit(lambda x, k: output_and_gradients(lambda x, k: conv3x3(x, k, padding=padding), x, k))(x, kernel)
    wanted = output_and_gradients(lambda x, k: plain(x, k, padding), x, kernel)
    assert max(map(relative_error, found, wanted)) < 1e-5


def test_in_bands_it_is_the_same(monkeypatch):
    x, kernel = inputs(2, 13, 9, 8, 8)
    monkeypatch.setattr(conv, "CACHED", 2**10)
    assert relative_error(winograd(x, transform_kernel(kernel, 2), padding=ROUND), plain(x, kernel)) < 1e-5


def test_stride_2_is_the_convolution():
    x, kernel = inputs(*LARGE)
    found = conv3x3(x, kernel, stride=2, padding=((0, 1), (0, 1)))
    np.testing.assert_array_equal(found, plain(x, kernel, ((0, 1), (0, 1)), 2))


@pytest.mark.parametrize("case", [
    "odd sides", *(pytest.param(case, marks=pytest.mark.slow) for case in ("whole tiles", "right and bottom only"))
])  # fmt: skip
def test_stride_2_of_many_channels_is_a_matrix_product_and_the_convolution(case, monkeypatch):
    shape, padding = CASES[case]
    x, kernel = inputs(*shape)
    monkeypatch.setattr(conv, "STRIDED", 1)

    def strided(x, kernel):
        return conv3x3(x, kernel, stride=2, padding=padding)

    found = output_and_gradients(strided, x, kernel)
    wanted = output_and_gradients(lambda x, k: plain(x, k, padding, 2), x, kernel)
    assert max(map(relative_error, found, wanted)) < 1e-5
    assert "stablehlo.convolution" not in jax.jit(strided).lower(x, kernel).as_text()


def test_images_that_vmap_adds_are_a_larger_batch():
    x, kernel = inputs(*LARGE)
    mapped = jax.jit(jax.vmap(lambda x: conv3x3(x[None], kernel)[0]))
    assert relative_error(mapped(x), plain(x, kernel)) < 1e-5
    # The products are those of the batch: one for each column of a tile, and none more for the images.
    products = mapped.lower(x).as_text().count("stablehlo.dot_general")
    assert products == jax.jit(conv3x3).lower(x, kernel).as_text().count("stablehlo.dot_general")


@pytest.mark.slow
def test_vmap_may_map_the_kernels_too():
    x, _ = inputs(*LARGE)
    kernels = jnp.stack([inputs(*LARGE, seed=s)[1] for s in range(LARGE[0])])
    for axis in (0, None):
        found = jax.vmap(lambda x, k: conv3x3(jnp.broadcast_to(x, LARGE[:4]), k), in_axes=(axis, 0))(x, kernels)
        for i in (0, 3):
            one = jnp.broadcast_to(x if axis is None else x[i], LARGE[:4])
            assert relative_error(found[i], plain(one, kernels[i])) < 1e-5


def test_gradients_of_mapped_images_are_those_of_the_batch():
    x, kernel = inputs(*LARGE)

    def loss(kernel):
        return jnp.square(jax.vmap(lambda x: conv3x3(x[None], kernel)[0])(x)).sum()

    wanted = jax.grad(lambda kernel: jnp.square(plain(x, kernel)).sum())(kernel)
    assert relative_error(jax.jit(jax.grad(loss))(kernel), wanted) < 1e-5


def test_a_mesh_splits_the_batch_and_nothing_travels_forward():
    x, kernel = inputs(8, *LARGE[1:])
    mesh = make_mesh(data=8)
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    program = jax.jit(conv3x3).lower(spread, jax.device_put(kernel, NamedSharding(mesh, P()))).compile()
    assert hlo.parse(program.as_text()).collectives() == {}
    assert relative_error(program(spread, jax.device_put(kernel, NamedSharding(mesh, P()))), plain(x, kernel)) < 1e-5


def test_gradients_on_a_mesh_are_those_of_one_device():
    x, kernel = inputs(8, *LARGE[1:])
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    parted = jax.device_put(kernel, NamedSharding(mesh, P(None, None, "fsdp", "tensor")))
    found = jax.jit(lambda x, k: output_and_gradients(conv3x3, x, k))(spread, parted)
    assert max(map(relative_error, found, output_and_gradients(plain, x, kernel))) < 1e-5


def test_parameters_are_those_of_linens_convolution():
    x = jnp.ones((1, 4, 4, 3), jnp.bfloat16)
    ours = Conv3x3(6, stride=2, padding=((0, 1), (0, 1)), dtype=jnp.bfloat16, name="conv")
    theirs = nn.Conv(6, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=jnp.bfloat16, name="conv")
    params, wanted = (module.init(jax.random.key(0), x) for module in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    found, wanted = ours.apply(params, x), theirs.apply(params, x)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


WIDE = UNetConfig(
    sample_size=8, block_out_channels=(64,), layers_per_block=1, attention_head_dim=8, cross_attention_dim=24,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
)  # fmt: skip


def unet_and_inputs():
    network = build.unet(WIDE)
    x, context = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 8, 8, 4), (8, 7, 24)]))
    return network, (x, jnp.full(8, 500.0), context)


@pytest.mark.slow
def test_a_prepared_network_is_the_plain_one(monkeypatch):
    network, given = unet_and_inputs()
    params = jax.jit(lambda: build.init(network, WIDE, jax.random.key(0)))()
    monkeypatch.setattr(conv, "prepared_tile", lambda c, c2: 2 if min(c, c2) >= 64 else None)
    prepared = by_module(prepare, params)
    assert len(jax.tree.leaves(prepared)) > len(jax.tree.leaves(params))
    found = jax.jit(network.apply)({"params": prepared}, *given)
    monkeypatch.setattr(conv, "tile", lambda *shape: None)
    wanted = jax.jit(network.apply)({"params": params}, *given)
    assert 0 < relative_error(found, wanted) < 1e-4


def test_a_prepared_convolution_has_the_gradient_of_the_plain_one_by_its_input(monkeypatch):
    x, kernel = inputs(2, 7, 9, 12, 16)
    monkeypatch.setattr(conv, "prepared_tile", lambda c, c2: 4)
    module = Conv3x3(16)
    params = {"kernel": kernel, "bias": jnp.arange(16.0)}
    prepared = prepare((), params)
    assert set(prepared) == {"winograd", "bias"}

    def loss(x, params):
        return jnp.sin(jax.vmap(lambda x: module.apply({"params": params}, x[None])[0])(x)).sum()

    assert relative_error(jax.grad(loss)(x, prepared), jax.grad(loss)(x, params)) < 1e-5


def test_the_kernel_of_a_stride_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(conv, "prepared_tile", lambda c, c2: 4)
    params = {"kernel": inputs(*LARGE)[1]}
    assert prepare(("downsamplers_0", "conv"), params) is params


@pytest.mark.slow
def test_programs_for_other_platforms_have_the_convolution_alone(monkeypatch):
    network, given = unet_and_inputs()
    params = build.param_shapes(network, WIDE)

    def loss(params):
        return jnp.square(network.apply({"params": params}, *given)).sum()

    def text(platform):
        # Function objects are told apart, so that no trace is taken from a cache.
        traced = jax.jit(jax.grad(lambda params: loss(params))).trace(params)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    def counts(text):
        return [text.count(f"stablehlo.{op}") for op in ("convolution", "dot_general", "pad", "slice", "while")]

    ours, on_cpu = counts(text("tpu")), counts(text("cpu"))
    monkeypatch.setattr(conv, "tile", lambda *shape: None)
    assert counts(text("tpu")) == ours
    assert on_cpu[0] < ours[0]
