"""The training step: micro-batches, updates left out, what is remembered, frozen and averaged, and where it lies."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff.config import EMAConfig, OptimConfig
from jaxdiff.runtime.mesh import make_mesh, path_name, spec_for, tree_shardings
from jaxdiff.training.feed import to_devices
from jaxdiff.training.noise import sample_keys
from jaxdiff.training.optim import DIRECTIONS, evaluated, learning_rate, optimiser
from jaxdiff.training.state import Task, create_state, freeze, gradients_of_mean, make_step, merge, select

B = 16
KEY = jax.random.key(5)
SHAPES = {
    "unet": {"conv_in": {"kernel": (3, 3, 2, 8)}, "conv1": {"kernel": (3, 3, 8, 8), "bias": (8,)}},
    "text_encoder": {"fc1": {"kernel": (128, 256), "bias": (256,)}, "fc2": {"kernel": (256, 8)}},
}


def init(key):
    """Quick to compile, and of full rank."""
    shift = jax.random.uniform(key)

    def fill(shape):
        return 0.1 * jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32) ** 1.3 + shift).reshape(shape)

    return jax.tree.map(fill, SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def loss(params, frozen, batch, key, memory):
    """Each sample's own number, told from a picture and a text; the memory counts samples and lists their numbers."""
    params = merge(frozen, params)
    conv = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME",
                   dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    unet, text = params["unet"], params["text_encoder"]
    x = conv(jnp.tanh(conv(batch["x"], unet["conv_in"]["kernel"])), unet["conv1"]["kernel"])
    h = jnp.tanh(batch["text"] @ text["fc1"]["kernel"] + text["fc1"]["bias"][None]) @ text["fc2"]["kernel"]
    x += unet["conv1"]["bias"].reshape(1, 1, 1, -1) + h[:, None, None]
    drawn = jax.vmap(jax.random.uniform)(sample_keys(key, batch["index"]))
    error = jnp.square(x - drawn[:, None, None, None]).mean((1, 2, 3)) * batch["weight"]
    return error.mean(), {"mse": error.mean()}, {"index": batch["index"], "error": error}


def remember(memory, notes):
    assert notes["index"].shape == (B,)
    return {"count": memory["count"] + B, "last": notes["index"]}


def task(**fields):
    return Task(init, loss, memory={"count": np.int32(0), "last": np.zeros(B, np.int32)}, remember=remember, **fields)


def batch(step=0, weight=1.0):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(B, 4, 4, 2)).astype(np.float32),
        "text": rng.normal(size=(B, 128)).astype(np.float32),
        "weight": np.full(B, weight, np.float32),
        "index": np.arange(step * B, (step + 1) * B),
    }


def build(mesh, task, ema=None, accumulate=1, **optim):
    config = OptimConfig(**{"lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "eps": 1e-3} | optim)
    task = freeze(task, config.factors)
    tx = optimiser(config, learning_rate(config, 100))
    state = create_state(task, tx, jax.random.key(0), mesh, ema)
    step_fn = make_step(task, tx, state, ema, accumulate)
    frozen = jax.device_put(task.frozen, tree_shardings(mesh, task.frozen))
    return state, lambda state, batch: step_fn(state, frozen, to_devices(batch, mesh), KEY)


def run(mesh, batches, **settings):
    state, step_fn = build(mesh, settings.pop("task", None) or task(), **settings)
    metrics = []
    for one in batches:
        state, found = step_fn(state, one)
        metrics.append(jax.device_get(found))
    return state, metrics


def alone():
    return make_mesh(devices=jax.devices()[:1])


def close(a, b, atol=2e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), jax.device_get(a), jax.device_get(b))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# Micro-batches --------------------------------------------------------------------------------------------------------


def test_micro_batches_change_nothing_but_rounding_on_one_device_and_on_eight():
    batches = [batch(0), batch(1)]
    expected, metrics = run(alone(), batches)
    for mesh, n in ((alone(), 4), (make_mesh(data=2, fsdp=2, tensor=2), 2), (make_mesh(), 2)):
        state, found = run(mesh, batches, accumulate=n)
        close((state.params, state.ema, found), (expected.params, expected.ema, metrics), atol=2e-5)
        same(state.memory, expected.memory)  # the notes are back in the batch's order


def test_micro_batches_need_less_memory_and_leave_rows_on_their_devices():
    mesh = make_mesh(data=8)
    memory = {}
    config = OptimConfig(name="sgd")
    tx = optimiser(config, learning_rate(config, 10))
    state = create_state(Task(init, loss), tx, KEY, mesh)
    big = to_devices({name: np.repeat(rows, 512, axis=0) for name, rows in batch().items()}, mesh)
    for n in (1, 8):
        compiled = make_step(Task(init, loss), tx, state, accumulate=n).lower(state, {}, big, KEY).compile()
        memory[n] = compiled.memory_analysis().temp_size_in_bytes
        assert "all-to-all" not in compiled.as_text()
        assert "collective-permute" not in compiled.as_text()
    assert memory[8] < memory[1] / 2, memory


def test_what_is_computed_again_is_not_kept_on_a_cpu_either():
    """XLA's CPU compiler would take the second computation for the first, and keep that."""
    weights = {f"w{i}": 0.1 * jnp.eye(64) for i in range(12)}

    def block(x, w):
        return jnp.tanh(jnp.sin(x) @ w) + x

    def deep(block):
        def loss(params, frozen, batch, key, memory):
            x = batch["x"]
            for w in params.values():
                x = block(x, w)
            return jnp.square(x).mean(), {}, {}

        return Task(lambda key: weights, loss)

    tx = optimiser(OptimConfig(name="sgd"), learning_rate(OptimConfig(name="sgd"), 10))
    x = to_devices({"x": np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)}, alone())
    memory, found = {}, {}
    for name, task in {"kept": deep(block), "again": deep(jax.checkpoint(block))}.items():
        state = create_state(task, tx, KEY, alone())
        step_fn = make_step(task, tx, state)
        memory[name] = step_fn.lower(state, {}, x, KEY).compile().memory_analysis().temp_size_in_bytes
        found[name] = step_fn(state, {}, x, KEY)[0].params
    assert memory["again"] < memory["kept"] / 2, memory
    close(found["again"], found["kept"])


def test_an_update_on_a_cpu_works_in_place():
    """Beside the gradient there is nothing of the size of the params, of which the state holds four times as much."""
    weights = {"w": jnp.ones((512, 1024)), "b": jnp.ones(1024)}
    task = Task(lambda key: weights, lambda params, *rest: (sum(x.sum() ** 2 for x in params.values()), {}, {}))
    tx = optimiser(OptimConfig(), learning_rate(OptimConfig(), 10))
    state = create_state(task, tx, KEY, alone())
    compiled = make_step(task, tx, state).lower(state, {}, to_devices(batch(), alone()), KEY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * weights["w"].nbytes


# Other gradients ------------------------------------------------------------------------------------------------------


def clipped(loss, params, frozen, batch, key, memory, clip):
    """The mean of the samples' gradients, each clipped to a norm (Abadi et al. 2016, algorithm 1, without noise)."""

    def of_sample(row):
        one = jax.tree.map(lambda x: x[None], row)
        grads, metrics, notes = gradients_of_mean(loss, params, frozen, one, key, memory)
        factor = jnp.minimum(1, clip / optax.tree.norm(grads))
        return jax.tree.map(lambda g: factor * g, grads), metrics, jax.tree.map(lambda x: x[0], notes)

    grads, metrics, notes = jax.vmap(of_sample)(batch)
    grads, metrics = jax.tree.map(lambda x: x.mean(0), (grads, metrics))
    return grads, metrics, notes


def test_each_samples_gradient_clipped_to_a_huge_norm_gives_the_gradient_itself():
    expected, metrics = run(alone(), [batch(0)])
    for mesh, n in ((alone(), 1), (make_mesh(data=2, fsdp=2, tensor=2), 2)):
        with_hook = task(gradients=partial(clipped, clip=1e9))
        state, found = run(mesh, [batch(0)], task=with_hook, accumulate=n)
        close((state.params, found), (expected.params, metrics), atol=2e-5)
        same(state.memory, expected.memory)


def test_each_samples_gradient_clipped_to_a_small_norm_bounds_that_of_the_mean():
    settings = {"task": task(gradients=partial(clipped, clip=1e-3))}
    _, (found,) = run(alone(), [batch(0, weight=100.0)], **settings)
    assert 0 < found["grad_norm"] <= 1e-3
    assert found["loss"] > 1  # which is not clipped


def test_a_loss_that_compares_samples_is_refused_in_micro_batches():
    with pytest.raises(ValueError, match="accumulate is 2, and the task's loss compares the samples of a batch"):
        build(alone(), task(independent=False), accumulate=2)
    build(alone(), task(independent=False))


def test_a_step_copies_nothing_to_its_devices_nor_between_them():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tx = optimiser(OptimConfig(), learning_rate(OptimConfig(), 100))
    state = create_state(task(), tx, KEY, mesh)
    step_fn = make_step(task(), tx, state, accumulate=2)
    key = jax.jit(lambda: jax.random.key(5), out_shardings=NamedSharding(mesh, PartitionSpec()))()
    batches = [to_devices(batch(step), mesh) for step in range(3)]
    with jax.transfer_guard("disallow"):
        for one in batches[:2]:
            state, _ = step_fn(state, {}, one, key)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-device transfer"):
            step_fn(state, {}, batches[2], KEY)  # which is on the first device alone


# Updates left out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])  # the last one overflows in the gradient
def test_an_update_that_is_not_finite_leaves_all_as_it_was_and_is_counted(bad):
    state, step_fn = build(make_mesh(data=2, fsdp=2, tensor=2), task())
    state, _ = step_fn(state, batch(0))
    before = jax.device_get(state)
    for row in range(2):
        spoilt = batch(1)
        spoilt["weight"][3] = bad
        state, metrics = step_fn(state, spoilt)
        assert int(metrics["skipped"]) == 1
        same((state.params, state.ema, state.opt, state.memory), (before.params, before.ema, before.opt, before.memory))
        assert int(state.step) == 2 + row
        assert state.skipped.tolist() == [row + 1, row + 1]
    state, metrics = step_fn(state, batch(2))
    assert int(metrics["skipped"]) == 0
    assert state.skipped.tolist() == [0, 2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    assert state.memory["last"].tolist() == batch(2)["index"].tolist()


def test_looking_for_what_is_not_finite_copies_no_state():
    """Each of the donated buffers comes back as the same buffer."""
    state, step_fn = build(alone(), task())
    state, _ = step_fn(state, batch(0))
    before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    state, _ = step_fn(state, batch(1))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)} == before


# Frozen parameters ----------------------------------------------------------------------------------------------------

FROZEN = ("unet/conv_in/.*=0", "text_encoder/.*=0")


def test_a_rate_of_zero_takes_parameters_out_of_the_state_and_trains_the_rest_as_before():
    start = jax.device_get(init(jax.random.key(9)))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, _ = run(mesh, [batch(0), batch(1)], task=task(start=start), rates=FROZEN)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not [path for path in paths if "conv_in" in path or "text_encoder" in path]
    # What is trained moves as it does beside parameters whose rate is all but nothing; sgd, lest those count in a norm.
    small = tuple(rate.replace("=0", "=1e-12") for rate in FROZEN)
    settings = {"name": "sgd", "clip_norm": 1e9, "task": task(start=start)}
    frozen, _ = run(alone(), [batch(0), batch(1)], rates=FROZEN, **settings)
    beside, _ = run(alone(), [batch(0), batch(1)], rates=small, **settings)
    close(frozen.params["unet"]["conv1"], beside.params["unet"]["conv1"])


def test_freezing_what_would_stay_random_or_everything_is_refused():
    with pytest.raises(ValueError, match="would freeze 'text_encoder/fc1/bias' at its random start"):
        freeze(task(), OptimConfig(rates=FROZEN).factors)
    with pytest.raises(ValueError, match="freezes every parameter"):
        freeze(task(start=init(KEY)), OptimConfig(rates=(".*=0",)).factors)


def test_a_start_may_name_some_networks_and_leave_others_random():
    start = {"unet": jax.tree.map(jnp.ones_like, init(KEY)["unet"])}
    state, _ = build(alone(), task(start=start))
    assert float(state.params["unet"]["conv1"]["kernel"].min()) == 1
    assert float(state.params["text_encoder"]["fc1"]["kernel"].std()) == pytest.approx(0.0707, rel=0.05)


def test_merging_what_was_selected_gives_the_whole_tree():
    whole = init(KEY)
    a, b = select(whole, lambda p: "bias" in p), select(whole, lambda p: "bias" not in p)
    assert set(a["text_encoder"]) == {"fc1"}
    same(merge(a, b), whole)
    same(merge(whole, {"unet": {"conv1": {"bias": jnp.ones(8)}}})["unet"]["conv1"]["bias"], jnp.ones(8))


# Averages -------------------------------------------------------------------------------------------------------------


def test_several_power_profiles_are_tracked_at_once_and_the_narrowest_is_evaluated():
    ema = EMAConfig(profile="power", widths=(0.05, 0.1))
    state, step_fn = build(alone(), task(), ema=ema)
    seen = []
    for step in range(3):
        state, _ = step_fn(state, batch(step))
        seen.append(jax.device_get(state.params["unet"]["conv1"]["bias"]))
        if step == 0:
            close(state.ema["0.050"], state.params)  # nothing of the random start is left
            close(state.ema["0.100"], state.params)
    edges = (np.arange(4) / 3) ** (6.9373 + 1)
    expected = sum(w * p for w, p in zip(np.diff(edges), seen, strict=True))
    np.testing.assert_allclose(state.ema["0.100"]["unet"]["conv1"]["bias"], expected, atol=1e-5)
    assert state.average is state.ema["0.050"]


def test_schedule_frees_own_average_is_what_is_averaged_and_evaluated():
    state, _ = run(alone(), [batch(i) for i in range(3)], ema=EMAConfig(decay=0.0), name="schedule_free")
    close(state.average, evaluated(state.params, state.opt))


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_every_leaf_of_every_optimiser_lies_where_the_table_says(name):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, _ = build(
        mesh,
        task(),
        name=name,
    )
    specs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        spec = spec_for(path_name(path), leaf.shape, mesh)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), path_name(path)
        specs[path_name(path)] = leaf
    # Whatever is as large as a matrix is spread as that is, and what is a sum over it lies everywhere.
    for path, leaf in specs.items():
        if path.endswith("fc1/kernel") and leaf.shape != (1,):
            assert (leaf.shape == (128, 256)) == (not leaf.sharding.is_fully_replicated), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimisers_that_look_at_whole_matrices_take_the_same_steps_on_eight_devices(name):
    spread, _ = run(make_mesh(data=2, fsdp=2, tensor=2), [batch(0)], name=name)
    single, _ = run(alone(), [batch(0)], name=name)
    close(spread.params, single.params, atol=1e-5)
