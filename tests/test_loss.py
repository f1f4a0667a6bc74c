"""The training loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.denoiser import PREDICTIONS, to_x_0
from jaxdiff.diffusion.loss import add_noise, diffusion_loss, draw, min_snr_weight
from jaxdiff.diffusion.schedule import make_schedule

KEY = jax.random.key(3)
SCHEDULE = make_schedule(SchedulerConfig())
X_0 = jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
CONTEXT = jnp.zeros((8, 1, 1))
INDEX = jnp.arange(100, 108)


def loss(network_fn, rows=slice(None), prediction_type="epsilon", gamma=None):
    return diffusion_loss(
        network_fn, X_0[rows], CONTEXT[rows], KEY, INDEX[rows],
        schedule=SCHEDULE, prediction_type=prediction_type, min_snr_gamma=gamma,
    )  # fmt: skip


def test_a_network_that_answers_nothing_pays_the_variance_of_the_noise():
    value, metrics = loss(lambda x, t, context: jnp.zeros_like(x))
    assert float(value) == pytest.approx(1.0, abs=0.2)
    assert value == metrics["mse"]


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_samples_draw_the_same_in_any_batch(gamma):
    def network_fn(x, t, context):
        return 0.5 * x * jnp.cos(t)[:, None, None, None]

    whole, _ = loss(network_fn, gamma=gamma)
    parts = [loss(network_fn, slice(i, i + 2), gamma=gamma)[0] for i in range(0, 8, 2)]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-6)


def test_timesteps_cover_the_schedule_evenly_and_noise_is_normal():
    t, eps = jax.vmap(lambda i: draw(jax.random.fold_in(KEY, i), (4,), 10))(jnp.arange(5000))
    assert (np.bincount(t, minlength=10) > 400).all()
    assert float(eps.mean()) == pytest.approx(0, abs=0.02)
    assert float(eps.std()) == pytest.approx(1, abs=0.02)


def test_the_noisy_input_has_unit_variance_at_every_level():
    x_0, eps = jax.random.normal(KEY, (2, 10_000))
    for sigma in SCHEDULE.sigmas[[0, 300, 999]]:
        assert float(add_noise(x_0, eps, jnp.float32(sigma)).std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weighs_the_error_in_x_0_alike_for_every_prediction(prediction_type):
    gamma = 5.0
    sigma = jnp.asarray(SCHEDULE.sigmas[[100, 400, 900]], jnp.float32)
    # An error of 1 in the output, carried to x_0, and weighed there by min(SNR, gamma).
    error = to_x_0(jnp.ones(3), jnp.zeros(3), sigma, prediction_type)
    snr = 1 / sigma**2
    np.testing.assert_allclose(
        min_snr_weight(sigma, prediction_type, gamma), jnp.minimum(snr, gamma) * error**2, rtol=1e-5
    )


def test_an_infinite_cap_on_epsilon_changes_nothing():
    value, metrics = loss(lambda x, t, context: 0.3 * x, gamma=1e12)
    assert float(value) == pytest.approx(float(metrics["mse"]), rel=1e-5)
