"""Which noise levels the samplers visit."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta as beta_distribution

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.sampling.samplers import SAMPLERS, count_steps, first_state, make_sigmas, starts_at_sigma
from jaxdiff.sampling.sigmas import ALIGNED, DEIS, DPM_SOLVER, LCM, PNDM, SCHEDULES, TCD, beta, exponential, karras

SD = SchedulerConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
FLOW = SchedulerConfig(prediction_type="flow_prediction", shift=3.0, clip_sample=False)
SCHEDULE, FLOW_SCHEDULE = make_schedule(SD), make_schedule(FLOW)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 10, 37])
def test_every_sampler_falls_by_every_schedule_that_it_can_use(steps, flow):
    config, schedule = (FLOW, FLOW_SCHEDULE) if flow else (SD, SCHEDULE)
    for name, sampler in SAMPLERS.items():
        for kind in sampler.schedules:
            if flow and (kind == "align_your_steps" or name in ("lcm", "tcd")):
                with pytest.raises(ValueError, match=r"flow matching|Stable Diffusion's noise levels"):
                    make_sigmas(name, kind, config, schedule, steps)
                continue
            sigmas = make_sigmas(name, kind, config, schedule, steps)
            n = count_steps(sigmas)
            assert n == steps + (name == "pndm" and steps > 1)
            assert len(sigmas.sigmas) == len(sigmas.sigmas_next) == 1000
            assert (np.diff(sigmas.sigmas[:n]) <= 0).all()
            assert (sigmas.sigmas_next[:n] <= sigmas.sigmas[:n]).all()
            assert np.isfinite(sigmas).all()
            assert not np.any([levels[n:] for levels in sigmas])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_one_step_goes_from_the_highest_level_to_the_lowest(spacing):
    config = replace(SD, timestep_spacing=spacing)
    for name, sampler in SAMPLERS.items():
        for kind in sampler.schedules:
            if sampler.family in (DPM_SOLVER, DEIS) and (kind, spacing) == ("model", "leading"):
                continue  # of two leading steps the first, as diffusers has it
            sigmas = make_sigmas(name, kind, config, SCHEDULE, 1)
            top = ALIGNED[0] if kind == "align_your_steps" else SCHEDULE.sigmas[-1]
            assert sigmas.sigmas[0] == pytest.approx(top, rel=1e-5), (name, kind)
            assert sigmas.sigmas_next[0] <= SCHEDULE.sigmas[0] * 1.001, (name, kind)


def test_k_diffusions_samplers_start_from_sigma_times_the_noise_where_the_spacing_reaches_the_last_training_step():
    noise = np.ones((1, 2, 2, 1), np.float32)
    for sampler, kind, spacing, at_sigma in (
        ("euler", "model", "trailing", True), ("heun", "karras", "linspace", True),
        ("euler", "trailing", "leading", True), ("euler", "model", "leading", False),
        ("ddim", "model", "trailing", False), ("dpmpp_2m", "model", "linspace", False),
    ):  # fmt: skip
        config = replace(SD, timestep_spacing=spacing)
        assert starts_at_sigma(sampler, kind, config) == at_sigma
        sigmas = make_sigmas(sampler, kind, config, SCHEDULE, 5)
        full = first_state(noise, sigmas, at_sigma) * np.sqrt(1 + sigmas.sigmas[0] ** 2)
        expected = sigmas.sigmas[0] if at_sigma else np.sqrt(1 + sigmas.sigmas[0] ** 2)
        np.testing.assert_allclose(full, expected * noise, rtol=1e-6)


def test_karras_levels_are_even_in_their_seventh_root():
    roots = karras(14.6, 0.03, 12) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0])
    np.testing.assert_allclose(karras(14.6, 0.03, 12)[[0, -1]], [14.6, 0.03])


def test_from_pure_noise_the_first_step_goes_to_where_the_spacing_begins():
    config = replace(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = make_schedule(config)
    sigmas = make_sigmas("dpmpp_2m", "karras", config, schedule, 10)
    assert sigmas.sigmas[0] > 1e5
    np.testing.assert_allclose(sigmas.sigmas[1:10], karras(schedule.sigmas[899], schedule.sigmas[0], 9), rtol=1e-6)


def test_exponential_levels_fall_by_one_ratio():
    levels = exponential(14.6, 0.03, 12)
    np.testing.assert_allclose(levels[1:] / levels[:-1], (0.03 / 14.6) ** (1 / 11))


def test_beta_levels_are_quantiles_of_the_beta_distribution():
    shares = (beta(14.6, 0.03, 12) - 0.03) / (14.6 - 0.03)
    np.testing.assert_allclose(beta_distribution(0.6, 0.6).cdf(shares), np.linspace(1, 0, 12), atol=1e-9)


def test_sgm_uniform_is_even_in_the_training_step_and_leaves_the_last_one_out():
    sigmas = make_sigmas("euler", "sgm_uniform", SD, SCHEDULE, 9)
    np.testing.assert_allclose(sigmas.sigmas[:9], SCHEDULE.sigmas[999:0:-111], rtol=1e-6)


def test_aligned_steps_are_the_published_ten_and_other_numbers_lie_between_them():
    ten = make_sigmas("dpmpp_2m", "align_your_steps", SD, SCHEDULE, 10).sigmas[:10]
    np.testing.assert_allclose(ten, [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152], rtol=1e-6)
    twenty = make_sigmas("dpmpp_2m", "align_your_steps", SD, SCHEDULE, 20).sigmas[:20]
    np.testing.assert_allclose(twenty[::2], ten, rtol=1e-6)
    np.testing.assert_allclose(twenty[1], np.sqrt(ten[0] * ten[1]), rtol=1e-6)
    other = SchedulerConfig(clip_sample=False)
    with pytest.raises(ValueError, match=r"is for Stable Diffusion's noise levels, 14.615 to 0.029; this model has"):
        make_sigmas("euler", "align_your_steps", other, make_schedule(other), 10)


def test_trailing_begins_in_the_noisiest_level_whatever_the_config_says():
    for name in ("ddim", "euler", "dpmpp_2m"):
        sigmas = make_sigmas(name, "trailing", SD, SCHEDULE, 10)
        np.testing.assert_allclose(sigmas.sigmas[:10], SCHEDULE.sigmas[999::-100], rtol=1e-6)


def test_pndm_goes_its_first_step_twice():
    sigmas = PNDM(SD, SCHEDULE, 10)
    assert count_steps(sigmas) == 11
    assert sigmas.sigmas[1] == sigmas.sigmas_next[1] == sigmas.sigmas[2] == sigmas.sigmas_next[0]


def test_distilled_models_visit_levels_that_they_were_distilled_at():
    sigmas = LCM(SD, SCHEDULE, 4)
    np.testing.assert_allclose(sigmas.sigmas[:4], SCHEDULE.sigmas[[999, 759, 499, 259]], rtol=1e-6)
    assert not sigmas.sigmas_next.any()
    down = TCD.with_eta(0.3)(SD, SCHEDULE, 4)
    np.testing.assert_array_equal(down.sigmas, sigmas.sigmas)
    np.testing.assert_allclose(down.sigmas_next[:4], SCHEDULE.sigmas[[531, 349, 181, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_numbers_of_steps_that_a_schedule_does_not_have_are_refused(kind):
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}; it must be a whole number from 1 to"):
            make_sigmas("dpmpp_2m", kind, SD, SCHEDULE, steps)
