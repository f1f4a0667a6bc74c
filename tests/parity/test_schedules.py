"""Noise tables, the levels that are visited, and each step are those of diffusers' DDIMScheduler."""

import inspect
import itertools
from functools import partial

import jax
import numpy as np
import pytest
import torch
from diffusers import schedulers

from jaxdiff.config import SchedulerConfig, to_dict
from jaxdiff.diffusion.prediction import PREDICTIONS
from jaxdiff.diffusion.schedule import BETAS, TERMINAL_ALPHA_BAR, make_schedule
from jaxdiff.io.scheduler import SCHEDULERS, SOME_HAVE, scheduler_class, scheduler_values
from jaxdiff.sampling.ddim import ddim
from jaxdiff.sampling.loop import begin, sampling_loop
from jaxdiff.sampling.sigmas import MODEL

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusers_scheduler(config):
    return getattr(schedulers, scheduler_class(config)).from_config(scheduler_values(config))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", list(BETAS))
def test_alpha_bar(betas, zero_snr, figures):
    if betas == "exp" and zero_snr:
        return  # diffusers has it in HeunDiscreteScheduler alone, which has no such rescaling
    error = 0.0
    for steps, (start, end) in itertools.product((1000, 50), ((0.0001, 0.02), (0.00085, 0.012))):
        config = SchedulerConfig(beta_start=start, beta_end=end, beta_schedule=betas, num_train_timesteps=steps,
                                 rescale_betas_zero_snr=zero_snr)  # fmt: skip
        theirs = diffusers_scheduler(config).alphas_cumprod.double().numpy()
        ours = make_schedule(config).alpha_bar
        if zero_snr:
            assert theirs[-1] == 0
            assert ours[-1] <= TERMINAL_ALPHA_BAR
        error = max(error, np.abs(ours - theirs).max())
    figures[f"alpha_bar, {betas}{', zero SNR' * zero_snr}: largest difference"] = error
    assert error < 1e-5


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_the_levels_visited(spacing, offset, one, zero_snr):
    config = SchedulerConfig(**SD_BETAS, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=one,
                             rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")  # fmt: skip
    theirs, schedule = diffusers_scheduler(config), make_schedule(config)
    for steps in [*range(2, 64), 100, 150, 200, 250, 333, 499, 500, 501, 750, 999, 1000]:
        theirs.set_timesteps(steps)
        t = theirs.timesteps[:steps]  # rounding gives diffusers one more, t = -1, for 61 trailing steps
        if t[0] > 999:  # diffusers fails at the first step
            with pytest.raises(ValueError, match="past the last"):
                MODEL(config, schedule, steps)
            continue
        sigmas = MODEL(config, schedule, steps)
        t_next = t - 1000 // steps
        next_bar = torch.where(t_next >= 0, theirs.alphas_cumprod[t_next.clamp(min=0)], theirs.final_alpha_cumprod)
        for ours, alpha_bar in ((sigmas.sigmas, theirs.alphas_cumprod[t]), (sigmas.sigmas_next, next_bar)):
            np.testing.assert_allclose(1 / (1 + ours[:steps].astype(np.float64) ** 2), alpha_bar, atol=1e-5)
            assert not ours[steps:].any()


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step(prediction, eta, clip, figures):
    config = SchedulerConfig(**SD_BETAS, prediction_type=prediction, clip_sample=clip is not None,
                             clip_sample_range=clip or 1.0, timestep_spacing="leading", steps_offset=1,
                             set_alpha_to_one=False)  # fmt: skip
    theirs, steps = diffusers_scheduler(config), 20
    theirs.set_timesteps(steps)
    sigmas = MODEL(config, make_schedule(config), steps)

    @jax.jit
    def take_step(x, out, noise, i):
        denoise_fn = lambda x, sigma: PREDICTIONS[prediction].x_0(out, x, sigma)  # noqa: E731
        sampler = partial(ddim, eta=eta, clip=clip)
        return sampling_loop(sampler, denoise_fn, lambda k: noise, begin(x), sigmas, i, i + 1).x

    rng, error = np.random.default_rng(0), 0.0
    for i, t in enumerate(theirs.timesteps):
        x, out, noise = rng.normal(size=(3, 5, 5, 4)).astype(np.float32)
        expected = theirs.step(
            torch.from_numpy(out), t, torch.from_numpy(x), eta=eta, variance_noise=torch.from_numpy(noise)
        ).prev_sample
        error = max(error, float(np.abs(take_step(x, out, noise, i) - expected.numpy()).max()))
    name = f"a DDIM step, {prediction}, eta {eta}{', clipped' * (clip is not None)}: largest difference"
    figures[name] = error
    assert error < 1e-4


def test_the_settings_that_some_schedulers_have_are_diffusers():
    for setting, classes in SOME_HAVE.items():
        having = {cls for cls in SCHEDULERS if setting in inspect.signature(getattr(schedulers, cls)).parameters}
        ignoring = {"TCDScheduler"} if setting == "thresholding" else set()
        assert {f"{cls}Scheduler" for cls in classes.split()} == having - ignoring, setting


def test_the_defaults_of_each_scheduler_class_are_diffusers():
    defaults = to_dict(SchedulerConfig())
    for name, known in SCHEDULERS.items():
        ours = dict(known.defaults)
        theirs = dict(getattr(schedulers, name)().config)
        for field, value in (defaults | ours).items():
            if field in theirs:
                assert theirs[field] == value, (name, field)
        if "clip_sample" not in theirs:
            assert ours["clip_sample"] is False, name
        for option, value in {**known.options, **known.left_out}.items():
            assert theirs.get(option, value) == known.left_out.get(option, value), (name, option)
