"""A run's state is spread as the table says, and that changes where numbers live, not what they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import TASK

from jaxdiff import build
from jaxdiff.config import OptimConfig, VAEConfig
from jaxdiff.runtime.mesh import make_mesh, path_name, spec_for, tree_shardings
from jaxdiff.training.feed import Feed, calls, to_devices
from jaxdiff.training.noise import normal_like
from jaxdiff.training.optim import learning_rate, optimiser
from jaxdiff.training.state import Batch, Metrics, Notes, Task, TrainState, apply, create_state, make_step
from jaxdiff.training.tasks.diffusion import diffusion_task, drop_captions
from jaxdiff.types import Key, Params

# The gradient of a key's bias is zero but for rounding, which a small eps would blow up to whole steps.
OPTIM = OptimConfig(lr=3e-3, warmup_steps=0, eps=1e-4)
B = 8


def batch(step: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "moments": rng.normal(size=(B, 4, 4, 8)).astype(np.float32),
        "tokens": rng.integers(0, 32, (B, 6)).astype(np.int32),
        "index": np.arange(step * B, (step + 1) * B),
    }


def text_task() -> Task:
    """A transformer that learns each sample's own noise: small, with every kind of matrix that the table splits."""
    module = build.text_encoder(TASK.text_encoder)

    def loss(params: Params, frozen: Params, batch: Batch, key: Key, memory: dict) -> tuple[jax.Array, Metrics, Notes]:
        context = apply(module, params, batch["tokens"])
        return jnp.square(context - normal_like(key, batch["index"], context)).mean(), {}, {}

    return Task(lambda key: build.init(module, TASK.text_encoder, key), loss)


def trained(task: Task, mesh: Mesh, steps: int) -> tuple[TrainState, list[float]]:
    """The state after some steps on ever the same batch, and the losses."""
    tx = optimiser(OPTIM, learning_rate(OPTIM, 100))
    state = create_state(task, tx, jax.random.key(0), mesh)
    step_fn = make_step(task, tx, state)
    frozen = jax.device_put(task.frozen, tree_shardings(mesh, task.frozen))
    losses = []
    for _ in range(steps):
        state, metrics = step_fn(state, frozen, to_devices(batch(), mesh), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return state, losses


def one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def spread() -> tuple[TrainState, list[float]]:
    return trained(text_task(), make_mesh(data=2, fsdp=2, tensor=2), 3)


def test_eight_devices_take_the_steps_that_one_takes(spread: tuple[TrainState, list[float]]) -> None:
    alone, losses = trained(text_task(), one_device(), 3)
    np.testing.assert_allclose(spread[1], losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(alone.ema), jax.tree.leaves(spread[0].ema), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)


@pytest.mark.slow
def test_eight_devices_take_the_steps_of_a_whole_text_to_image_model_and_its_loss_falls() -> None:
    task = diffusion_task(TASK, VAEConfig(), {"empty_tokens": np.zeros(6, np.int32)})
    _, alone = trained(task, one_device(), 40)
    _, spread = trained(task, make_mesh(data=2, fsdp=2, tensor=2), 3)
    np.testing.assert_allclose(spread, alone[:3], rtol=1e-4)
    assert np.mean(alone[-8:]) < 0.8 * np.mean(alone[:8])


MESHES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_gradient_is_the_same_on_a_mesh_of_any_shape(
    shape: tuple[int, int, int], gradients_alone: Params
) -> None:
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradients(make_mesh(*shape))), jax.tree.leaves(gradients_alone), strict=True
    ):
        scale = np.abs(wanted).max() + 1e-4  # the gradient of a key's bias is zero but for rounding
        np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-4, err_msg=path_name(path))


@pytest.fixture(scope="session")
def gradients_alone() -> Params:
    return gradients(one_device())


def gradients(mesh: Mesh) -> Params:
    """Of a whole text-to-image model's loss at its first parameters: what one step of plain descent takes off them."""
    task = diffusion_task(TASK, VAEConfig(), {"empty_tokens": np.zeros(6, np.int32)})
    tx = optax.sgd(1.0)
    state = create_state(task, tx, jax.random.key(0), mesh)
    before = jax.device_get(state.params)
    frozen = jax.device_put(task.frozen, tree_shardings(mesh, task.frozen))
    state, _ = make_step(task, tx, state)(state, frozen, to_devices(batch(), mesh), jax.random.key(1))
    return jax.tree.map(np.subtract, before, jax.device_get(state.params))


def test_every_leaf_lies_where_the_table_says(spread: tuple[TrainState, list[float]]) -> None:
    state, _ = spread
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    split = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        spec = spec_for(path_name(path), leaf.shape, mesh)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), path_name(path)
        split += not leaf.sharding.is_fully_replicated
    kernels = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "kernel" in path_name(path)]
    assert split > 0.8 * len(kernels)  # params, EMA and both moments


def test_params_and_their_average_share_no_buffer() -> None:
    state = create_state(text_task(), optimiser(OPTIM, learning_rate(OPTIM, 10)), jax.random.key(0), one_device())
    pointers = [
        leaf.unsafe_buffer_pointer() for tree in (state.params, state.average) for leaf in jax.tree.leaves(tree)
    ]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/unet/down_blocks_0/attentions_0/attn1/to_q/kernel", (8, 8), P("fsdp", "tensor")),
        ("opt/1/0/mu/unet/mid_block/attentions_0/attn2/to_out_0/kernel", (8, 8), P("tensor", "fsdp")),
        ("ema/unet/conv_in/kernel", (3, 3, 4, 8), P(None, None, "fsdp", "tensor")),
        ("ema/unet/conv_in/kernel", (3, 3, 3, 8), P(None, None, None, "tensor")),
        ("params/unet/attentions_0/proj_in/kernel", (8, 8), P("fsdp", "tensor")),
        ("params/unet/time_embedding/linear_1/kernel", (8, 8), P("fsdp", None)),
        ("params/text_encoder/text_model/embeddings/token_embedding/embedding", (32, 8), P(None, "fsdp")),
        ("params/unet/conv_norm_out/scale", (8,), P(None)),
        ("opt/1/0/count", (), P()),
    ],
)
def test_the_table_knows_the_leaf(path: str, shape: tuple[int, ...], spec: P) -> None:
    assert spec_for(path, shape, make_mesh(data=2, fsdp=2, tensor=2)) == spec


def test_a_mesh_that_does_not_fit_the_devices_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"data 3 .* 3 devices.* 8\b"):
        make_mesh(data=3)


def test_a_caption_is_dropped_by_its_own_number_and_in_the_wanted_share() -> None:
    tokens, empty = jnp.ones((1000, 3), jnp.int32), jnp.zeros(3, jnp.int32)
    index, key = jnp.arange(1000), jax.random.key(0)
    dropped = drop_captions(tokens, empty, 0.1, key, index)[:, 0] == 0
    assert 0.06 < dropped.mean() < 0.14
    order = jnp.flip(index)
    assert jnp.array_equal(drop_captions(tokens, empty, 0.1, key, order)[:, 0] == 0, dropped[order])


def test_a_feed_hands_on_what_its_source_gives_and_what_it_raises() -> None:
    def source():
        yield batch(0)
        yield batch(1)
        raise ValueError("the disk is gone")

    with Feed(calls(source(), itertools.repeat(1)), make_mesh()) as feed:
        for step in (0, 1):
            _, found = next(feed)
            assert found["index"].dtype == jnp.int32
            assert found["moments"].sharding.spec == P(("data", "fsdp"))
            np.testing.assert_array_equal(found["moments"], batch(step)["moments"])
        with pytest.raises(ValueError, match="the disk is gone"):
            next(feed)
