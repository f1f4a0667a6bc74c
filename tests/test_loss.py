"""The training loss, its weights and its draws, against the formulas of their papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion import timesteps, weights
from jaxdiff.diffusion.loss import diffusion_loss
from jaxdiff.diffusion.prediction import EPSILON, FLOW, PREDICTIONS, SAMPLE, V
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.runtime.mesh import make_mesh

KEY = jax.random.key(3)
SCHEDULE = make_schedule(SchedulerConfig())
FLOW_SCHEDULE = make_schedule(SchedulerConfig(prediction_type="flow_prediction", clip_sample=False))
X_0 = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
CONTEXT = jnp.zeros((8, 1, 1))
INDEX = jnp.arange(100, 108)


def loss(network_fn, rows=slice(None), prediction=EPSILON, **settings):
    return diffusion_loss(
        network_fn, X_0[rows], CONTEXT[rows], KEY, INDEX[rows],
        schedule=FLOW_SCHEDULE if prediction.flow else SCHEDULE, prediction=prediction, **settings
    )  # fmt: skip


def half(x, t, context):
    return 0.5 * x * jnp.cos(t)[:, None, None, None]


def test_a_network_that_answers_nothing_pays_the_variance_of_the_noise():
    value, metrics, notes = loss(lambda x, t, context: jnp.zeros_like(x))
    assert float(value) == pytest.approx(1.0, abs=0.2)
    assert value == metrics["mse"]
    np.testing.assert_allclose(notes["loss"].mean(), value, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"weight_fn": weights.min_snr}, {"noise_offset": 0.1}])
def test_samples_draw_the_same_in_any_batch(settings):
    whole, _, notes = loss(half, **settings)
    parts = [loss(half, slice(i, i + 2), **settings) for i in range(0, 8, 2)]
    np.testing.assert_allclose(np.mean([part[0] for part in parts]), whole, rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([part[2]["level"] for part in parts]), notes["level"])


# Noise ----------------------------------------------------------------------------------------------------------------


def noise_of(x_0, index, **settings):
    """The noise of each sample, which is what a perfect network of the noise would answer."""
    seen = []
    network_fn = lambda x, t, context: seen.append((x, t)) or x  # noqa: E731
    diffusion_loss(network_fn, x_0, jnp.zeros((len(x_0), 1, 1)), KEY, index, schedule=SCHEDULE,
                   prediction=EPSILON, **settings)  # fmt: skip
    x, t = seen[0]
    alpha_bar = SCHEDULE.alpha_bar[np.asarray(t, int)][:, None, None, None]
    return (x - np.sqrt(alpha_bar) * x_0) / np.sqrt(1 - alpha_bar)


def test_the_networks_input_is_that_of_ho_et_al_with_normal_noise():
    eps = noise_of(jnp.ones((4000, 2, 2, 1)), jnp.arange(4000))
    assert float(eps.mean()) == pytest.approx(0, abs=0.03)
    assert float(eps.std()) == pytest.approx(1, abs=0.03)


def test_a_noise_offset_is_one_normal_constant_for_each_samples_channels():
    x_0, index = jnp.zeros((2000, 3, 3, 2)), jnp.arange(2000)
    added = noise_of(x_0, index, noise_offset=0.3) - noise_of(x_0, index)
    np.testing.assert_allclose(added, jnp.broadcast_to(added[:, :1, :1], added.shape), atol=1e-3)
    assert float(added[:, 0, 0].std()) == pytest.approx(0.3, abs=0.02)
    assert abs(np.corrcoef(added[:, 0, 0].T)[0, 1]) < 0.1


# Flow matching --------------------------------------------------------------------------------------------------------


def test_flow_matching_is_the_straight_line_and_its_direction():
    seen = []
    loss(lambda x, t, context: seen.append((x, t)) or x, prediction=FLOW)
    x, t = seen[0]
    share = t[:, None, None, None] / 1000
    eps = (x - (1 - share) * X_0) / share
    # A network that answers eps - x_0 pays nothing.
    value, _, _ = loss(lambda x, t, context: eps - X_0, prediction=FLOW)
    assert float(value) == pytest.approx(0, abs=1e-6)
    # One that answers 0 pays the mean square of the direction.
    value, _, _ = loss(lambda x, t, context: jnp.zeros_like(x), prediction=FLOW)
    assert float(value) == pytest.approx(float(jnp.mean((eps - X_0) ** 2)), rel=1e-4)


# Weights --------------------------------------------------------------------------------------------------------------

LEVELS = jnp.asarray(SCHEDULE.sigmas[[5, 100, 400, 900]], jnp.float32)
SNR = LEVELS**-2


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize(
    ("weight_fn", "of_x_0"),
    [
        (weights.min_snr, jnp.minimum(SNR, 5.0)),
        (weights.debiased, jnp.sqrt(SNR)),
        (partial(weights.edm, sigma_data=0.5), (LEVELS**2 + 0.25) / (LEVELS * 0.5) ** 2),
    ],
)
def test_a_weight_counts_the_error_in_x_0_alike_for_every_prediction(prediction, weight_fn, of_x_0):
    # An error of 1 in the output, carried to x_0 (an affine map: take the difference), and weighed there.
    one, zero = (prediction.x_0(jnp.full(4, float(out)), jnp.zeros(4), LEVELS) for out in (1, 0))
    np.testing.assert_allclose(weight_fn(LEVELS, prediction), of_x_0 * (one - zero) ** 2, rtol=1e-5)


def test_weights_have_the_closed_forms_of_their_papers():
    np.testing.assert_allclose(weights.min_snr(LEVELS, EPSILON), jnp.minimum(SNR, 5) / SNR, rtol=1e-6)  # Hang, 3.4
    np.testing.assert_allclose(weights.min_snr(LEVELS, V), jnp.minimum(SNR, 5) / (SNR + 1), rtol=1e-6)
    np.testing.assert_allclose(weights.debiased(LEVELS, EPSILON), SNR**-0.5, rtol=1e-6)  # Yu
    np.testing.assert_allclose(weights.edm(LEVELS, V), 1, rtol=1e-6)
    np.testing.assert_allclose(weights.edm(LEVELS, SAMPLE, 0.5), 4 + LEVELS**-2, rtol=1e-5)  # Karras, table 1
    np.testing.assert_array_equal(weights.unweighted(LEVELS, EPSILON), 1)


def test_an_infinite_cap_on_epsilon_changes_nothing():
    value, metrics, _ = loss(lambda x, t, context: 0.3 * x, weight_fn=partial(weights.min_snr, gamma=1e12))
    assert float(value) == pytest.approx(float(metrics["mse"]), rel=1e-5)


# Levels ---------------------------------------------------------------------------------------------------------------


def drawn(draw_fn, n=20_000):
    return jax.jit(jax.vmap(lambda i: draw_fn(jax.random.fold_in(KEY, i))))(jnp.arange(n))


def test_uniform_levels_cover_the_schedule_evenly():
    levels, share = drawn(timesteps.uniform(10))
    np.testing.assert_allclose(np.bincount(levels, minlength=10) / len(levels), 0.1, atol=0.01)
    np.testing.assert_array_equal(share, 1)


def test_logit_normal_levels_have_the_density_of_esser_et_al():
    levels, _ = drawn(timesteps.logit_normal(1000, 0.5, 0.8))
    u = (np.arange(1000) + 0.5) / 1000
    logit = np.log(u / (1 - u))
    density = np.exp(-((logit - 0.5) ** 2) / (2 * 0.8**2)) / (0.8 * np.sqrt(2 * np.pi) * u * (1 - u))  # eq. 19
    expected = density.reshape(20, 50).sum(1) / 1000
    np.testing.assert_allclose(np.bincount(levels // 50, minlength=20) / len(levels), expected, atol=0.008)
    assert 0 <= levels.min() <= levels.max() < 1000


def full_history(steps=8):
    """Levels whose loss is 1, 2, ... and of no spread, but for the last, which has nine of 0 and one of 10."""
    losses = np.repeat(np.arange(1.0, steps + 1)[:, None], 10, axis=1)
    losses[-1] = [0] * 9 + [10]
    return {"losses": jnp.asarray(losses, jnp.bfloat16), "seen": jnp.full(steps, 10)}


def test_importance_goes_by_the_root_of_the_mean_squared_loss():
    rms = np.append(np.arange(1, 8), np.sqrt(10))  # Nichol & Dhariwal 2021, eq. 18
    expected = 0.999 * rms / rms.sum() + 0.001 / 8
    np.testing.assert_allclose(timesteps.probabilities(full_history()), expected, rtol=1e-5)
    levels, share = drawn(timesteps.importance(full_history()))
    np.testing.assert_allclose(np.bincount(levels, minlength=8) / len(levels), expected, atol=0.01)
    np.testing.assert_allclose(share, 1 / (8 * expected[levels]), rtol=1e-5)


def test_importance_leaves_the_expected_loss_as_it_is():
    past, value = full_history(), np.random.default_rng(0).uniform(size=8)
    p = timesteps.probabilities(past)
    assert float((p * value / (8 * p)).sum()) == pytest.approx(value.mean())
    levels, share = drawn(timesteps.importance(past))
    assert float(jnp.mean(share * value[levels])) == pytest.approx(value.mean(), rel=0.02)


def test_importance_is_even_until_every_level_has_been_seen_ten_times():
    past = full_history()
    young = past | {"seen": past["seen"].at[3].set(9)}
    np.testing.assert_allclose(timesteps.probabilities(young), 1 / 8)
    np.testing.assert_allclose(timesteps.probabilities(timesteps.history(5)), 1 / 5)


def test_a_history_keeps_each_levels_last_ten_losses_in_the_batchs_order():
    rng = np.random.default_rng(0)
    past, expected = timesteps.history(4), {level: [] for level in range(4)}
    for _ in range(5):
        level, value = rng.integers(0, 3, 40), rng.uniform(1, 2, 40).astype(np.float32)
        past = jax.jit(timesteps.remember)(past, jnp.asarray(level), jnp.asarray(value))
        for one, number in zip(level, np.asarray(jnp.asarray(value, jnp.bfloat16)), strict=True):
            expected[int(one)].append(float(number))
    for level in range(4):
        assert past["seen"][level] == len(expected[level])
        assert sorted(map(float, past["losses"][level])) == sorted(([0.0] * 10 + expected[level])[-10:])


@pytest.mark.parametrize("draw_fn", [
    timesteps.uniform(1000), timesteps.logit_normal(1000), timesteps.importance(full_history()),
])  # fmt: skip
def test_draws_are_the_same_bits_on_one_two_four_and_eight_devices(draw_fn):
    def levels_and_noise(index):
        def draw(i):
            key, noise_key = jax.random.split(jax.random.fold_in(KEY, i))
            return *draw_fn(key), jax.random.normal(noise_key, (3, 3))

        return jax.vmap(draw)(index)

    found = []
    for n in (1, 2, 4, 8):
        sharding = NamedSharding(make_mesh(devices=jax.devices()[:n]), P("data"))
        found.append(jax.jit(levels_and_noise)(jax.device_put(np.arange(64), sharding)))
        assert found[-1][0].sharding.is_equivalent_to(sharding, 1)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
