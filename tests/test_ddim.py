"""DDIM against closed forms and against the published toy."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import draw_toy

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.denoiser import make_denoiser
from jaxdiff.diffusion.prediction import FLOW
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.sampling.ddim import ddim
from jaxdiff.sampling.loop import begin, keyed_noise, no_noise, sampling_loop
from jaxdiff.sampling.sigmas import MODEL, Sigmas

KEY = jax.random.key(0)


@pytest.mark.parametrize(("prediction_type", "expected"), [("epsilon", 172.0067), ("v_prediction", 52.5302)])
def test_the_published_toy_gives_the_published_sums(prediction_type, expected):
    x_0 = draw_toy("ddim", SchedulerConfig(prediction_type=prediction_type), steps=10)
    assert float(jnp.sum(jnp.abs(x_0))) == pytest.approx(expected, abs=1e-2)


# Data N(m, s^2). Its denoiser is known, and so is where the probability flow takes each start.
M, S = 0.7, 0.5


def gaussian(x, sigma):
    return (S**2 * x + sigma**2 * M) / (S**2 + sigma**2)


def karras(steps: int, top: float = 20.0, bottom: float = 0.02) -> Sigmas:
    levels = np.linspace(top ** (1 / 7), bottom ** (1 / 7), steps) ** 7
    levels = np.append(levels, 0).astype(np.float32)
    return Sigmas(levels[:-1], levels[1:])


def test_the_error_against_a_gaussians_closed_form_falls_at_first_order():
    x_T = jax.random.normal(KEY, (4, 4, 1))
    errors = []
    for steps in (20, 40, 80, 160):
        sigmas = karras(steps)
        top = sigmas.sigmas[0]
        # dx/dsigma = (x - D)/sigma keeps (x - m) / sqrt(s^2 + sigma^2) constant (Karras et al. 2022, eq. 4).
        exact = M + (x_T * np.sqrt(1 + top**2) - M) * S / np.sqrt(S**2 + top**2)
        x_0 = jax.jit(lambda x, s, n=steps: sampling_loop(ddim, gaussian, no_noise, begin(x), s, 0, n).x)(x_T, sigmas)
        errors.append(float(jnp.abs(x_0 - exact).max()))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all((rates > 0.85) & (rates < 1.15)), (errors, rates)


def test_with_eta_one_the_samples_have_the_datas_mean_and_spread():
    keys = jax.random.split(KEY, 4096)
    sigmas = karras(400)

    def sample(key):
        x_T = jax.random.normal(jax.random.fold_in(key, 10_000), (1, 1, 1))
        noise_fn = keyed_noise(key, x_T.shape)
        return sampling_loop(partial(ddim, eta=1.0), gaussian, noise_fn, begin(x_T), sigmas, 0, 400).x

    x_0 = jax.jit(jax.vmap(sample))(keys)
    assert float(x_0.mean()) == pytest.approx(M, abs=0.03)
    assert float(x_0.std()) == pytest.approx(S, abs=0.03)


def test_pieces_of_the_loop_make_the_whole_loop_bit_for_bit():
    sigmas, sampler, noise_fn = karras(12), partial(ddim, eta=0.5), keyed_noise(KEY, (2, 2, 1))
    run = jax.jit(lambda state, start, stop: sampling_loop(sampler, gaussian, noise_fn, state, sigmas, start, stop))
    x_T = begin(jax.random.normal(KEY, (2, 2, 1)))
    np.testing.assert_array_equal(run(run(run(x_T, 0, 1), 1, 7), 7, 12).x, run(x_T, 0, 12).x)


def test_clipping_bounds_the_result():
    x_T = begin(jnp.ones((2, 2, 1)))
    sampler = partial(ddim, clip=1.0)
    state = sampling_loop(sampler, lambda x, sigma: 5 * jnp.ones_like(x), no_noise, x_T, karras(3), 0, 3)
    assert float(jnp.abs(state.x).max()) == 1.0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_at_a_flows_levels_it_takes_eulers_steps_along_the_flow(shift, steps):
    config = SchedulerConfig(prediction_type="flow_prediction", shift=shift, clip_sample=False)
    schedule = make_schedule(config)

    def network_fn(x, t):
        return jnp.sin(3 * x) + x * t / 1000

    # diffusers' FlowMatchEulerDiscreteScheduler: dx/dt = v at these times (Liu et al. 2023, section 2.1).
    first = shift / (1000 + shift - 1)
    times = np.linspace(1, first, steps)
    times = np.append(shift * times / (1 + (shift - 1) * times), 0)
    x = x_T = jax.random.normal(KEY, (4, 4, 2))
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * network_fn(x, 1000 * t)

    denoise_fn = make_denoiser(network_fn, schedule, FLOW)
    sigmas = MODEL(config, schedule, steps)
    x_0 = sampling_loop(ddim, denoise_fn, no_noise, begin(x_T), sigmas, 0, steps).x
    np.testing.assert_allclose(x_0, x, atol=2e-4)
