"""Noise schedules and the levels that samplers visit."""

import numpy as np
import pytest

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.sampling.sigmas import MODEL, timesteps

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def config(**fields) -> SchedulerConfig:
    return SchedulerConfig(**{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | fields)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_levels_rise_strictly_and_are_finite(name, zero_snr):
    schedule = make_schedule(config(beta_schedule=name, rescale_betas_zero_snr=zero_snr))
    assert np.isfinite(schedule.sigmas).all()
    assert (np.diff(schedule.sigmas) > 0).all()
    assert np.isfinite(schedule.sigmas.astype(np.float32) ** 2).all()


def test_stable_diffusions_levels_are_the_published_ones():
    sigmas = make_schedule(config()).sigmas
    np.testing.assert_allclose(sigmas[[0, -1]], [0.0292, 14.6146], rtol=2e-3)


def test_the_cosine_schedule_follows_its_closed_form():
    schedule = make_schedule(config(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100))
    s = np.arange(1, 100) / 100
    f = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:-1], f, rtol=1e-9)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise():
    plain, rescaled = make_schedule(config()), make_schedule(config(rescale_betas_zero_snr=True))
    assert rescaled.alpha_bar[0] == pytest.approx(plain.alpha_bar[0])
    assert rescaled.alpha_bar[-1] < 1e-11


@pytest.mark.parametrize(
    ("spacing", "offset", "expected"),
    [("leading", 1, [751, 501, 251, 1]), ("trailing", 0, [999, 749, 499, 249]), ("linspace", 0, [999, 666, 333, 0])],
)
def test_spacings_are_those_of_table_2(spacing, offset, expected):
    assert timesteps(spacing, 1000, 4, offset).tolist() == expected


def test_the_levels_end_at_zero_or_at_the_first_training_level():
    schedule = make_schedule(config())
    for to_one, last in ((True, 0.0), (False, schedule.sigmas[0])):
        sigmas = MODEL(config(steps_offset=1, set_alpha_to_one=to_one), schedule, 30)
        assert sigmas.sigmas_next[29] == pytest.approx(last)
        np.testing.assert_array_equal(sigmas.sigmas_next[:29], sigmas.sigmas[1:30])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30, 999, 1000])
def test_levels_of_any_number_of_steps_have_one_shape_and_finite_falling_levels(spacing, steps):
    cfg = config(timestep_spacing=spacing)
    sigmas = MODEL(cfg, make_schedule(cfg), steps)
    assert sigmas.sigmas.shape == sigmas.sigmas_next.shape == (1000,)
    assert (np.diff(sigmas.sigmas[:steps]) < 0).all()
    assert (sigmas.sigmas_next[:steps] < sigmas.sigmas[:steps]).all()


def test_steps_that_cannot_be_taken_are_refused():
    schedule = make_schedule(config())
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"steps is {steps}; it must be a whole number from 1 to 1000"):
            MODEL(config(), schedule, steps)
    with pytest.raises(ValueError, match="start at training step 1000"):
        MODEL(config(steps_offset=1), schedule, 1000)
    zero_snr = config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="pure noise"):
        MODEL(zero_snr, make_schedule(zero_snr), 10)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_levels_are_shifted_times_over_what_is_left(shift):
    cfg = SchedulerConfig(prediction_type="flow_prediction", shift=shift, clip_sample=False)
    schedule = make_schedule(cfg)
    t = np.arange(1, 1001) / 1000
    t = shift * t / (1 + (shift - 1) * t)  # Esser et al. 2024, eq. 23
    np.testing.assert_allclose(schedule.times, 1000 * t, rtol=2e-6)
    np.testing.assert_allclose(schedule.sigmas[:-1], t[:-1] / (1 - t[:-1]), rtol=1e-9)
    assert 1e5 < schedule.sigmas[-1] < np.inf
    sigmas = MODEL(cfg, schedule, 28)
    assert sigmas.sigmas.shape == (1000,)
    assert (sigmas.sigmas_next[:28] < sigmas.sigmas[:28]).all()
    assert sigmas.sigmas_next[27] == 0


def test_settings_that_flow_matching_does_not_have_are_refused():
    with pytest.raises(ValueError, match="clip_sample is True; flow_prediction has no clipping"):
        SchedulerConfig(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"shift is 3.0; it is for prediction_type 'flow_prediction'"):
        SchedulerConfig(shift=3.0)
