"""Learning rates by their closed forms, optimisers against optax's own, and rates by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff.config import OptimConfig
from jaxdiff.training.optim import DIRECTIONS, check_rates, evaluated, learning_rate, optimiser, orthogonal, rate_of

KEY = jax.random.key(0)
SHAPES = {
    "conv_in": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "fc": {"kernel": (6, 5), "bias": (5,)},
    "large": {"kernel": (128, 130)},
}


def tree(seed: int, scale: float = 1.0):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(treedef, [scale * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


def walk(tx, steps=4, scale=1.0):
    """The parameters after some steps on gradients that do not depend on them, and the optimiser's state."""
    params = tree(0)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        with jax.numpy_dtype_promotion("standard"):  # as optax's own optimisers need it
            updates, state = update(tree(step + 1, scale), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def config(**fields) -> OptimConfig:
    """No clip, decay or warm-up."""
    plain = {"lr": 0.01, "schedule": "constant", "warmup_steps": 0, "clip_norm": 1e9, "weight_decay": 0.0}
    return OptimConfig(**plain | fields)


def ours(**fields):
    return optimiser(config(**fields), learning_rate(config(**fields), 100))


# Learning rates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "after"), [
    ("constant", lambda step: 1.0),
    ("cosine", lambda step: 0.1 + 0.9 * (1 + np.cos(np.pi * (step - 10) / 90)) / 2),
    ("linear", lambda step: 1 - 0.9 * (step - 10) / 90),
    ("rsqrt", lambda step: max(0.1, np.sqrt(10 / step))),
    ("wsd", lambda step: 1 - 0.9 * max(0, step - 80) / 20),
])  # fmt: skip
def test_a_rate_warms_up_along_a_line_and_then_follows_its_formula(schedule, after):
    rate = learning_rate(
        OptimConfig(lr=2.0, schedule=schedule, warmup_steps=10, final_lr_share=0.1, decay_share=0.2), 100
    )
    expected = [(step + 1) / 11 if step < 10 else after(step) for step in range(101)]
    np.testing.assert_allclose([float(rate(step)) for step in range(101)], 2 * np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "rsqrt", "wsd"])
def test_a_warm_up_longer_than_the_run_and_a_run_of_one_step_have_finite_rates(schedule):
    for steps, warmup in ((5, 500), (1, 0), (1, 500)):
        rate = learning_rate(OptimConfig(schedule=schedule, warmup_steps=warmup), steps)
        assert np.isfinite([float(rate(step)) for step in range(steps + 1)]).all()
        assert float(rate(0)) > 0


# Optimisers -----------------------------------------------------------------------------------------------------------


def of_optax(name, lr=0.01):
    return {
        "adamw": lambda: optax.adamw(lr, 0.9, 0.99, weight_decay=0.0),
        "adafactor": lambda: optax.adafactor(lr),
        "lion": lambda: optax.lion(lr, 0.9, 0.99, weight_decay=0.0),
        "adagrad": lambda: optax.adagrad(lr, eps=1e-8),
        "schedule_free": lambda: optax.contrib.schedule_free_adamw(lr, b1=0.9, b2=0.99),
        "sgd": lambda: optax.sgd(lr, 0.9),
    }[name]()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "adagrad", "schedule_free", "sgd"])
def test_an_optimiser_takes_the_steps_of_optaxs_own(name):
    for a, b in zip(*(jax.tree.leaves(walk(tx)[0]) for tx in (ours(name=name), of_optax(name))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_adamw_clips_and_decays_matrices_as_optaxs_chain_does():
    fields = {"weight_decay": 0.1, "clip_norm": 0.5}
    mask = jax.tree.map(lambda p: p.ndim > 1, tree(0))
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.01, 0.9, 0.99, weight_decay=0.1, mask=mask))
    for a, b in zip(*(jax.tree.leaves(walk(tx)[0]) for tx in (ours(**fields), chain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_muon_steps_are_orthogonal_for_matrices_and_adams_for_the_rest():
    start, (params, _) = tree(0), walk(ours(name="muon"), steps=1)
    step = jax.tree.map(lambda a, b: (a - b) / 0.01, start, params)
    for name, matrix in (("conv", (36, 8)), ("fc", (6, 5)), ("large", (128, 130))):
        # All singular values are near one (Jordan et al. 2024), times 0.2 sqrt(the longer side) (Liu et al. 2025).
        values = np.linalg.svd(step[name]["kernel"].reshape(matrix), compute_uv=False) / (0.2 * max(matrix) ** 0.5)
        assert 0.4 < values.min() <= values.max() < 1.3, name  # five iterations leave small ones behind
    adam, _ = walk(optax.adam(0.01, 0.9, 0.99), steps=1)
    for name, leaf in (("conv_in", "kernel"), ("conv_in", "bias"), ("conv", "bias")):
        np.testing.assert_allclose(params[name][leaf], adam[name][leaf], rtol=1e-5)


def test_matrices_that_are_made_orthogonal_together_are_what_optax_makes_of_each():
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 5), "b": (5, 6), "c": (6, 5), "conv": (3, 3, 4, 8), "square": (7, 7)}
    kernels = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    found = orthogonal(kernels, 1e-8)
    for name, kernel in kernels.items():
        matrix = kernel.reshape(-1, kernel.shape[-1])
        muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
        with jax.numpy_dtype_promotion("standard"):
            expected, _ = muon.update(matrix, muon.init(matrix))
        size = 0.2 * max(matrix.shape) ** 0.5
        np.testing.assert_allclose(found[name].reshape(matrix.shape), size * expected, atol=2e-5)


def test_schedule_free_is_evaluated_at_its_average():
    # With b1 near 0 gradients are taken at z, which takes plain steps; the average of z is what is evaluated.
    params, opt = walk(ours(name="schedule_free", b1=0.9))
    _, (_, state) = walk(ours(name="schedule_free", b1=0.9))
    expected = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, params, state.z)  # y = (1 - b1) z + b1 x, Defazio eq. 3
    for a, b in zip(jax.tree.leaves(evaluated(params, opt)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    params, opt = walk(ours())
    assert evaluated(params, opt) is params


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_every_optimiser_finds_a_minimum(name):
    target = tree(7)
    tx = ours(name=name, lr=0.3 if name in ("adagrad", "adafactor", "muon") else 0.03)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.subtract, params, target), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda p: 0.1 * p, tree(0))
    before, state = params, tx.init(params)
    for _ in range(150):
        params, state = step(params, state)

    def distance(params):
        return float(optax.tree.norm(jax.tree.map(jnp.subtract, evaluated(params, state), target)))

    assert distance(params) < 0.35 * float(optax.tree.norm(jax.tree.map(jnp.subtract, before, target)))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_first_moments_are_halved_and_the_rest_stays_float32(name):
    half, state = walk(ours(name=name, state_dtype="bfloat16"))
    full, _ = walk(ours(name=name))
    kinds = {"mu": jnp.bfloat16, "trace": jnp.bfloat16, "nu": jnp.float32}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        (kind,) = {kinds[k] for k in kinds if f".{k}[" in jax.tree_util.keystr(path)} or {leaf.dtype}
        assert leaf.dtype == kind, jax.tree_util.keystr(path)
    for start, a, b in zip(*map(jax.tree.leaves, (tree(0), half, full)), strict=True):
        assert a.dtype == jnp.float32
        if name != "lion":  # whose steps are signs
            assert float(jnp.abs(a - b).max()) < 0.05 * float(jnp.abs(b - start).max())


def test_settings_that_an_optimiser_does_not_have_are_refused():
    with pytest.raises(ValueError, match="adafactor has no first moment to keep in it; adamw, lion, muon, sgd have"):
        OptimConfig(name="adafactor", state_dtype="bfloat16")
    with pytest.raises(ValueError, match="schedule_free takes 'constant'"):
        OptimConfig(name="schedule_free")
    for rate in ("unet/.*", "unet=fast", "(=0.1", "a=-1", "=1"):
        with pytest.raises(ValueError, match="it must be PATTERN=FACTOR"):
            OptimConfig(rates=(rate,))


# Rates by path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_a_rate_by_path_multiplies_the_step_and_the_first_pattern_counts(name):
    start = tree(0)
    plain, _ = walk(ours(name=name), steps=1)
    slow, _ = walk(ours(name=name, rates=("conv/bias=0.5", "conv/.*=0.1")), steps=1)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(start), *map(jax.tree.leaves, (plain, slow)), strict=True
    ):
        factor = rate_of(jax.tree_util.keystr(path, simple=True, separator="/"), (("conv/bias", 0.5), ("conv/.*", 0.1)))
        np.testing.assert_allclose(c - a, factor * (b - a), rtol=1e-4, atol=1e-6)


def test_a_pattern_that_matches_nothing_is_told_the_nearest_path():
    with pytest.raises(
        ValueError, match=r"'unet/conv_inn/.*' matches no parameter; the nearest is 'unet/conv_in/bias'"
    ):
        check_rates((("unet/conv_inn/.*", 0.1),), ["unet/conv_in/bias", "text_encoder/kernel"])
