"""Samplers against closed forms, at their order, in pieces, and against the published toys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from toys import draw_scaled_toy, draw_toy, toy_schedule

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.sampling.loop import State, begin, no_noise, sampling_loop
from jaxdiff.sampling.samplers import SAMPLERS, check_sampler, count_steps, make_sigmas
from jaxdiff.sampling.sigmas import DEIS, Sigmas, karras, spaced

NOISY = ("ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "lcm")
QUIET = tuple(name for name in SAMPLERS if name not in NOISY)
TWO_CALLS = ("heun", "flow_heun", "dpm2", "dpm2_ancestral", "dpmpp_sde", "edict")

# Data N(m, s^2). Its denoiser is known, and so is where the probability flow takes each start.
M, S = 0.7, 0.5


def gaussian(x, sigma):
    return (S**2 * x + sigma**2 * M) / (S**2 + sigma**2)


def consistent(x, sigma):
    """Where the probability flow of that data ends: what a perfectly distilled model answers."""
    return M + (x - M) * S / jnp.sqrt(S**2 + sigma**2)


@pytest.fixture(scope="module")
def loops():
    """One compiled loop a sampler, over pictures of 64 x 64 independent pixels."""

    def compiled(name):
        denoise_fn = consistent if name == "lcm" else gaussian

        @jax.jit
        def loop(state, noise, sigmas, start, stop):
            return sampling_loop(SAMPLERS[name].fn, denoise_fn, noise.__getitem__, state, sigmas, start, stop)

        return loop

    return {name: compiled(name) for name in SAMPLERS}


@pytest.fixture(scope="module")
def noise():
    return jnp.asarray(np.random.default_rng(0).standard_normal((400, 64, 64, 1), np.float32))


@pytest.fixture(scope="module")
def x_T():
    return jnp.asarray(np.random.default_rng(1).standard_normal((64, 64, 1), np.float32))


def levels(steps, top=20.0, bottom=0.02, length=1000):
    """Levels that fall to 0, for any sampler but lcm."""
    read = np.zeros(length, np.float32)
    read[:steps] = karras(top, bottom, steps)
    return Sigmas(read, np.append(read[1:], np.float32(0)))


def levels_for(name, steps):
    sigmas = levels(steps)
    return Sigmas(sigmas.sigmas, np.zeros_like(sigmas.sigmas)) if name == "lcm" else sigmas


@pytest.mark.parametrize("name", QUIET)
def test_a_deterministic_sampler_ends_where_a_gaussians_probability_flow_does(name, loops, x_T, noise):
    sigmas = levels_for(name, 200)
    x_0 = loops[name](begin(x_T), noise, sigmas, 0, 200).x
    exact = consistent(x_T * np.sqrt(1 + sigmas.sigmas[0] ** 2), sigmas.sigmas[0])
    # dx/dsigma = (x - D)/sigma keeps (x - m) / sqrt(s^2 + sigma^2) constant (Karras et al. 2022, eq. 4).
    # EDICT's two latents of first order are apart, and drawn together.
    tolerance = {"ddim": 2e-2, "euler": 2e-2, "tcd": 2e-2, "edict": 1e-1}.get(name, 2e-3)
    assert float(jnp.abs(x_0 - exact).max()) < tolerance


@pytest.mark.parametrize("name", NOISY)
def test_a_random_samplers_pictures_have_the_datas_mean_and_spread(name, loops, x_T, noise):
    steps = 4 if name == "lcm" else 200
    x_0 = loops[name](begin(x_T), noise, levels_for(name, steps), 0, steps).x
    assert float(x_0.mean()) == pytest.approx(M, abs=0.03)
    assert float(x_0.std()) == pytest.approx(S, abs=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pieces_of_a_loop_make_the_whole_loop_bit_for_bit_and_nothing_compiles_again(name, loops, x_T, noise):
    loop, sigmas = loops[name], levels_for(name, 9)
    whole = loop(begin(x_T), noise, sigmas, 0, 9)
    before = loop._cache_size()
    state = begin(x_T)
    for start, stop in ((0, 1), (1, 2), (2, 6), (6, 9)):
        state = loop(state, noise, sigmas, start, stop)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    loop(begin(x_T), noise, levels_for(name, 30), 0, 30)
    assert loop._cache_size() == before


@pytest.mark.parametrize("name", QUIET)
def test_a_loop_from_a_later_step_on_is_a_loop_over_the_remaining_levels(name, loops, x_T, noise):
    sigmas = levels_for(name, 20)
    rest = Sigmas(*(np.append(part[8:], np.zeros(8, np.float32)) for part in sigmas))
    if name == "pndm":  # from the top it goes its first step twice
        rest = Sigmas(*(np.insert(part, 1, rest.sigmas[1])[:1000] for part in rest))
        from_top = loops[name](begin(x_T), noise, rest, 0, 13).x
        middle = loops[name](begin(x_T), noise, sigmas, 8, 20).x
        assert 0 < float(jnp.abs(from_top - middle).max()) < 0.1
        return
    np.testing.assert_allclose(
        loops[name](begin(x_T), noise, sigmas, 8, 20).x,
        loops[name](begin(x_T), noise, rest, 0, 12).x,
        rtol=1e-5,
        atol=1e-6,
    )


def test_on_gaussian_data_the_reverse_sdes_integrators_have_the_exact_mean_at_any_step(loops, x_T, noise):
    # With its noise left out, dx/dsigma = 2 (x - D)/sigma keeps D as it is, and D is all that they approximate.
    x = x_T * np.sqrt(1 + 20.0**2)
    exact = M + (x - M) * (S**2 + 0.5**2) / (S**2 + 20.0**2)
    read = np.zeros(1001, np.float32)
    read[:4] = 20, 6, 2, 0.5
    sigmas = Sigmas(read[:-1], read[1:])
    for name in ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"):
        state = loops[name](begin(x_T), jnp.zeros_like(noise), sigmas, 0, 3)
        np.testing.assert_allclose(state.x * np.sqrt(1 + 0.5**2), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_guess_is_the_first_call_of_the_last_step_and_costs_no_call(name, x_T, noise):
    calls, sigmas = [], levels_for(name, 4)

    def counted(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    def asked(state, i):
        """What the denoiser says of the state."""
        return gaussian(state.x * np.sqrt(1 + sigmas.sigmas[i] ** 2), sigmas.sigmas[i])

    start = begin(x_T)
    assert not start.guess.any()
    first = sampling_loop(SAMPLERS[name].fn, counted, noise.__getitem__, start, sigmas, 0, 1)
    assert len(calls) == (2 if name in TWO_CALLS else 1)  # traced once
    np.testing.assert_allclose(first.guess, asked(start, 0), rtol=1e-5, atol=1e-6)
    second = sampling_loop(SAMPLERS[name].fn, counted, noise.__getitem__, first, sigmas, 1, 2)
    if name not in ("lcm", "edict"):  # which first climb with noise, and ask for the second latent
        np.testing.assert_allclose(second.guess, asked(first, 1), rtol=1e-5, atol=1e-6)


# Order of convergence -------------------------------------------------------------------------------------------------

# Data at -1 and 1, spread by W: the denoiser bends, and so tells orders apart.
W = 0.6


def two_peaks(x, sigma, xp=jnp):
    v = W**2 + sigma**2
    return (W**2 * x + sigma**2 * xp.tanh(x / v)) / v


# With noise left out, whose integrators solve the reverse SDE's drift. dpmpp_3m_sde is second order by its published
# weights, and unipc's corrector gains one.
ORDERS = {
    "ddim": 1, "ddpm": 1, "euler": 1, "euler_ancestral": 1, "heun": 2, "flow_heun": 2, "dpm2": 2, "dpm2_ancestral": 1,
    "lms": 4, "pndm": 2, "deis": 2, "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "dpmpp_3m_sde": 2, "dpmpp_sde": 2, "unipc": 3,
    "tcd": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def exact():
    """Where the flow (1) and the reverse SDE without its noise (2) take 8 starts; sigma falls from 5."""

    def path(pull):
        return solve_ivp(
            lambda t, x: pull * (x - two_peaks(x, np.exp(t), np)), np.log([5.0, 0.5]), 5.1 * np.linspace(-1.5, 1.9, 8),
            method="DOP853", rtol=1e-11, atol=1e-12, dense_output=True,
        ).sol  # fmt: skip

    paths = {pull: path(pull) for pull in (1, 2)}
    return lambda pull, sigma: paths[pull](np.log(sigma))


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_at_the_samplers_order(name, exact):
    pull = 2 if name in NOISY else 1
    counts = (40, 80) if name == "lms" else (160, 320)
    errors = []
    with jax.enable_x64(True):
        loop = jax.jit(partial(sampling_loop, SAMPLERS[name].fn, two_peaks, no_noise))
        for n in counts:
            # Even in log sigma, as pndm's weights ask; the levels after the last step keep it from lowering its order.
            read = np.pad(5 * 10 ** -(np.arange(n + 21) / n), (0, 320 - n))
            first = 3 if name == "lms" else 0  # which has its order from the fourth step on, so it is given three
            history = np.zeros((5, 8, 1, 1))
            for k in range(first):
                x = exact(1, read[first - 1 - k])
                history[k, :, 0, 0] = (x - two_peaks(x, read[first - 1 - k], np)) / read[first - 1 - k]
            x = exact(pull, read[first]).reshape(8, 1, 1) / np.sqrt(1 + read[first] ** 2)
            state = State(*map(jnp.asarray, (x, history, np.int64(first), np.zeros_like(x))))
            sigmas = Sigmas(read[:-1], read[1:])  # pyright: ignore[reportArgumentType]
            x = np.asarray(loop(state, sigmas, first, n).x).ravel() * np.sqrt(1 + read[n] ** 2)
            errors.append(np.abs(x - exact(pull, read[n])).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.2), errors


# The published toys ---------------------------------------------------------------------------------------------------

# sampler, prediction, schedule -> the sum of absolute values in diffusers' tests/schedulers
SCALED = {
    ("euler", "epsilon", "model"): 10.0807,
    ("euler", "epsilon", "karras"): 124.52299,
    ("euler", "v_prediction", "model"): 0.0002,
    ("euler_ancestral", "epsilon", "model"): 152.3192,
    ("euler_ancestral", "v_prediction", "model"): 108.4439,
    ("heun", "epsilon", "model"): 0.1233,
    ("heun", "epsilon", "karras"): 0.00015,
    ("lms", "epsilon", "model"): 1006.388,
    ("lms", "epsilon", "karras"): 3812.9927,
    ("dpm2", "epsilon", "model"): 20.4125,
    ("dpm2_ancestral", "epsilon", "model"): 13979.9433,
    ("dpm2_ancestral", "v_prediction", "model"): 331.8133,
}
LINSPACE = {"timestep_spacing": "linspace", "clip_sample": False}


@pytest.mark.parametrize(("case", "expected"), SCALED.items())
def test_the_toys_of_k_diffusions_samplers_give_the_published_sums(case, expected):
    name, prediction, schedule = case
    config = SchedulerConfig(prediction_type=prediction, num_train_timesteps=1100, **LINSPACE)
    total = float(np.abs(np.asarray(draw_scaled_toy(name, config, 10, schedule), np.float64)).sum())
    assert total == pytest.approx(expected, abs=1e-2, rel=3e-6)  # float32 holds 14,000 no better


# sampler, prediction, levels, steps -> the sum, or for 10 steps of the solvers the mean over 768 values
PLAIN = {
    ("ddpm", "epsilon", None, 1000): 258.9606,
    ("ddpm", "v_prediction", None, 1000): 202.0296,
    ("deis", "epsilon", None, 10): 768 * 0.23916,
    ("deis", "v_prediction", None, 10): 768 * 0.091,
    ("dpmpp_2m", "epsilon", "full order", 10): 768 * 0.3301,
    ("dpmpp_2m", "v_prediction", "full order", 10): 768 * 0.2251,
    ("unipc", "epsilon", "to sigma_min", 10): 768 * 0.2464,
    ("unipc", "v_prediction", "to sigma_min", 10): 768 * 0.1014,
    ("unipc", "epsilon", "karras", 10): 768 * 0.2925,
    ("lcm", "epsilon", None, 1): 18.7097,
    ("lcm", "epsilon", None, 10): 197.7616,
    ("tcd", "epsilon", None, 1): 29.8715,
    ("tcd", "epsilon", None, 10): 181.2040,
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize(("case", "expected"), PLAIN.items())
def test_the_toys_of_the_other_samplers_give_the_published_sums(case, expected):
    name, prediction, ends, steps = case
    fields = {"ddpm": {}, "lcm": SD_BETAS, "tcd": SD_BETAS}.get(name, LINSPACE)
    config = SchedulerConfig(prediction_type=prediction, **fields)
    schedule = toy_schedule(config)
    sigmas = None
    if ends == "to sigma_min":
        sigmas = DEIS(config, schedule, steps)
    elif ends == "karras":
        sigmas = spaced(karras, DEIS)(config, schedule, steps)
    elif ends == "full order":  # levels after the last step taken keep it from lowering its order
        sigmas = DEIS(config, schedule, steps)
        more = schedule.sigmas[0] * 0.5 ** np.arange(10)
        sigmas = Sigmas(*(np.concatenate([part[:steps], more]).astype(np.float32) for part in sigmas))
    total = float(np.abs(np.asarray(draw_toy(name, config, steps, sigmas), np.float64)).sum())
    assert total == pytest.approx(expected, abs=1e-2 if name in ("ddpm", "lcm", "tcd") else 768e-3)


# What users ask -------------------------------------------------------------------------------------------------------


def test_what_a_sampler_cannot_use_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"Unknown sampler 'eular'; did you mean 'euler'\?"):
        check_sampler("eular")
    with pytest.raises(ValueError, match=r"Unknown schedule 'karas'; did you mean 'karras'\?"):
        check_sampler("euler", "karas")
    with pytest.raises(ValueError, match="The sampler lcm cannot use the schedule 'karras'; it can use: model"):
        check_sampler("lcm", "karras")
    with pytest.raises(ValueError, match=r"eta is 0.5, which the sampler euler does not take; it is for ddim and tcd"):
        check_sampler("euler", eta=0.5)
    config = SchedulerConfig(clip_sample=False)
    with pytest.raises(ValueError, match="steps is 51; it must be a whole number from 1 to 50"):
        make_sigmas("lcm", "model", config, make_schedule(config), 51)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_finite_pictures_in_one_step_and_in_as_many_as_allowed(name, loops, x_T, noise):
    config = SchedulerConfig(clip_sample=False, num_train_timesteps=100, timestep_spacing="trailing")
    schedule = make_schedule(config)
    for steps in (1, 2, 3, 50 if name in ("lcm", "tcd") else 99):
        sigmas = make_sigmas(name, "model", config, schedule, steps)
        sigmas = Sigmas(*(np.pad(part, (0, 900)) for part in sigmas))
        assert np.isfinite(loops[name](begin(x_T), noise, sigmas, 0, count_steps(sigmas)).x).all()
