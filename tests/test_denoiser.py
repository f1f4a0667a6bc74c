"""Networks as denoisers, and guidance round them."""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig, from_dict
from jaxdiff.diffusion.denoiser import make_denoiser, sigma_to_t
from jaxdiff.diffusion.guidance import Guidance, guided, projected, within
from jaxdiff.diffusion.prediction import EPSILON, PREDICTIONS, SAMPLE, V
from jaxdiff.diffusion.schedule import make_schedule

SCHEDULE = make_schedule(SchedulerConfig())
FLOW = make_schedule(SchedulerConfig(prediction_type="flow_prediction", clip_sample=False))
X_0, EPS = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_network_that_answers_the_target_denoises_perfectly(prediction, t):
    schedule = FLOW if prediction.flow else SCHEDULE
    sigma = jnp.float32(schedule.sigmas[t])

    def network_fn(x_in, step):
        assert x_in.shape == X_0.shape
        assert float(step) == pytest.approx(schedule.times[t], rel=1e-6)
        return prediction.target(X_0, EPS, sigma)

    denoise_fn = make_denoiser(network_fn, schedule, prediction)
    # Of x_0, pure noise keeps only what float32 resolves beside it.
    atol = 1e-4 if sigma < 1e3 else 1e-6 * float(sigma)
    np.testing.assert_allclose(denoise_fn(X_0 + sigma * EPS, sigma), X_0, atol=atol)


def test_v_is_the_velocity_of_salimans_and_ho():
    alpha_bar = SCHEDULE.alpha_bar[300]
    v = V.target(X_0, EPS, jnp.float32(SCHEDULE.sigmas[300]))
    np.testing.assert_allclose(v, np.sqrt(alpha_bar) * EPS - np.sqrt(1 - alpha_bar) * X_0, atol=1e-5)


@pytest.mark.parametrize("config", [
    SchedulerConfig(),
    SchedulerConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    SchedulerConfig(beta_schedule="squaredcos_cap_v2"),
    SchedulerConfig(rescale_betas_zero_snr=True),
    SchedulerConfig(num_train_timesteps=4000),
])  # fmt: skip
def test_every_training_level_maps_to_its_exact_integer(config):
    schedule = make_schedule(config)
    t = jax.jit(jax.vmap(lambda sigma: sigma_to_t(sigma, schedule)))(schedule.sigmas.astype(np.float32))
    np.testing.assert_array_equal(t, np.arange(config.num_train_timesteps))


def test_a_level_between_two_steps_maps_between_them():
    assert float(
        sigma_to_t(jnp.float32(np.sqrt(SCHEDULE.sigmas[10] * SCHEDULE.sigmas[11])), SCHEDULE)
    ) == pytest.approx(10.5, abs=1e-2)


def test_the_network_is_given_unit_variance():
    sigma = jnp.float32(50.0)
    seen = []
    make_denoiser(lambda x_in, t: seen.append(x_in) or x_in, SCHEDULE, SAMPLE)(sigma * EPS, sigma)
    assert float(jnp.std(seen[0])) == pytest.approx(float(jnp.std(EPS)), rel=1e-3)


def test_predictions_are_those_that_a_config_can_have():
    assert list(PREDICTIONS) == list(get_args(get_type_hints(SchedulerConfig)["prediction_type"]))
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        from_dict(SchedulerConfig, {"prediction_type": "flow"})


def cond(x, sigma):
    return 0.3 * x


def uncond(x, sigma):
    return 0.1 * x + 1


def rows_of(*guesses):
    return lambda x, sigma: jnp.stack([guess(x, sigma) for guess in guesses])


def whole(sigma):
    return jnp.ones((1, 1, 1, 1))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_guidance_extrapolates_from_the_negative_prompts_guess_through_the_prompts(scale):
    out = guided(rows_of(uncond, cond), whole, Guidance(scale), EPSILON)(X_0, jnp.float32(2.0))
    u, c = uncond(X_0, None), cond(X_0, None)
    np.testing.assert_allclose(out, u + scale * (c - u), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_a_scale_of_one_is_the_prompts_guess_bit_for_bit_whatever_else_guidance_does_not_do(prediction):
    one = guided(rows_of(uncond, cond), whole, Guidance(jnp.float32(1.0)), prediction)
    np.testing.assert_array_equal(one(X_0, jnp.float32(2.0)), cond(X_0, None))
    outside = guided(rows_of(uncond, cond), whole, Guidance(7.5, rescale=0.7, low=3.0, high=4.0), prediction)
    np.testing.assert_array_equal(outside(X_0, jnp.float32(2.0)), cond(X_0, None))


def other(x, sigma):
    return jnp.cos(x)


def test_parts_that_compose_add_their_directions():
    weights = jnp.array([0.5, 2.0]).reshape(2, 1, 1, 1)
    out = guided(rows_of(uncond, cond, other), lambda s: weights, Guidance(3.0), EPSILON)(X_0, jnp.float32(2.0))
    u, c, o = (f(X_0, None) for f in (uncond, cond, other))
    np.testing.assert_allclose(out, u + 3 * (0.5 * (c - u) + 2 * (o - u)), rtol=1e-5, atol=1e-5)


def test_weights_by_pixel_lay_prompts_out_over_the_picture():
    left = jnp.zeros((*X_0.shape[:-1], 1)).at[:, :3].set(1)
    weights = jnp.stack([left, 1 - left])
    out = guided(rows_of(uncond, cond, other), lambda s: weights, Guidance(3.0), EPSILON)(X_0, jnp.float32(2.0))
    u = uncond(X_0, None)
    first, second = (u + 3 * (f(X_0, None) - u) for f in (cond, other))
    np.testing.assert_allclose(out, jnp.where(left == 1, first, second), rtol=1e-5, atol=1e-5)


def test_rescaled_guidance_has_the_deviation_of_the_prompts_own_answer():
    sigma = jnp.float32(2.0)
    for prediction in (EPSILON, V, SAMPLE):

        def answer(guess, prediction=prediction):
            return float(jnp.std(prediction.target(guess, (X_0 - guess) / sigma, sigma)))

        full = guided(rows_of(uncond, other), whole, Guidance(7.5, rescale=1.0), prediction)(X_0, sigma)
        assert answer(full) == pytest.approx(answer(other(X_0, None)), rel=1e-4)


def test_projected_guidance_has_no_part_along_the_guess_and_no_more_than_its_limit():
    direction, guess = jnp.cos(3 * X_0), jnp.sin(X_0)
    np.testing.assert_array_equal(projected(direction, guess, 1.0, jnp.inf), direction)
    across = projected(direction, guess, 0.0, 2.0)
    assert float((across * guess).sum()) == pytest.approx(0, abs=1e-3)
    assert float(jnp.linalg.norm(projected(direction, guess, 1.0, 2.0))) == pytest.approx(2, rel=1e-5)


def test_perturbed_attention_is_gone_away_from():
    out = guided(rows_of(uncond, cond, other), whole, Guidance(1.0, pag_scale=3.0), EPSILON)(X_0, jnp.float32(2.0))
    c, p = cond(X_0, None), other(X_0, None)
    np.testing.assert_allclose(out, c + 3 * (c - p), rtol=1e-5, atol=1e-5)


def test_guiding_the_guess_of_x_0_is_guiding_the_noise():
    sigma, scale = jnp.float32(3.0), 7.5
    x = X_0 + sigma * EPS
    out_c, out_u = 0.2 * x, 0.5 * x - 1
    of_noise = EPSILON.x_0(out_u + scale * (out_c - out_u), x, sigma)
    guesses = rows_of(*(lambda x, s, out=out: EPSILON.x_0(out, x, s) for out in (out_u, out_c)))
    of_x_0 = guided(guesses, whole, Guidance(scale), EPSILON)
    np.testing.assert_allclose(of_x_0(x, sigma), of_noise, rtol=1e-4, atol=1e-4)


def test_one_side_of_an_interval_alone_is_computed_also_for_many_images_in_a_loop():
    asked = []

    def counted(name, denoise_fn):
        def denoise(x, sigma):
            jax.debug.callback(lambda sigma: asked.append((name, float(sigma))), sigma)
            return denoise_fn(x, sigma)

        return denoise

    sigmas = jnp.array([8.0, 4.0, 2.0, 1.0])

    @jax.jit
    def draw(x, low, high):
        denoise_fn = within(counted("inside", cond), counted("outside", uncond), Guidance(1.0, low=low, high=high))
        loop = jax.vmap(lambda x: jax.lax.fori_loop(0, len(sigmas), lambda i, x: denoise_fn(x, sigmas[i]), x))
        return loop(x)

    x = jnp.stack([X_0, EPS])
    out = draw(x, 2.0, 4.0)
    jax.effects_barrier()
    assert set(asked) == {("outside", 8.0), ("inside", 4.0), ("inside", 2.0), ("outside", 1.0)}
    np.testing.assert_allclose(out, uncond(cond(cond(uncond(x, 0), 0), 0), 0), rtol=1e-5)
    draw(x, 0.0, 0.5)
    assert draw._cache_size() == 1
