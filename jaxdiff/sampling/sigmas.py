"""Which noise levels sigma the samplers visit.

A sampler belongs to a family of diffusers' schedulers that take the same training steps from the same config: `MODEL`
(DDIM and its kin), `K_DIFFUSION`, `DPM_SOLVER` and others. The family's own levels are those of the schedule "model".
The other `SCHEDULES` put the levels between the family's ends otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Float64
from scipy.special import betaincinv

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import NoiseSchedule, flow_sigmas, shifted

Levels = Float32[np.ndarray, " n"] | Float32[Array, " n"]
Falling = Float64[np.ndarray, " n"]


class Sigmas(NamedTuple):
    """The noise levels of all steps, padded with zeros, so that a compiled program takes any number of steps.

    Usually `sigmas_next[i]` is `sigmas[i + 1]`. diffusers' DDIM does not always go on from where it arrived (see
    `MODEL`); the network's input, x / sqrt(1 + sigma^2), is then the same at both levels.
    """

    sigmas: Levels
    """The level at which step i reads x."""
    sigmas_next: Levels
    """The level at which step i leaves x."""


# (config, noise schedule of the config, number of steps) -> the levels of each step.
SigmasFn = Callable[[SchedulerConfig, NoiseSchedule, int], Sigmas]
# The same arguments -> the highest and the lowest level.
EndsFn = Callable[[SchedulerConfig, NoiseSchedule, int], tuple[float, float]]


# Families -------------------------------------------------------------------------------------------------------------


def training_ends(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> tuple[float, float]:
    """The last and the first training level."""
    return schedule.sigmas[-1], schedule.sigmas[0]


def flow_levels(config: SchedulerConfig, schedule: NoiseSchedule, steps: int, spare: int = 0) -> Sigmas:
    """The levels of FlowMatchEulerDiscreteScheduler, at most `num_train_timesteps - spare`."""
    total = config.num_train_timesteps
    _check_steps(steps, total - spare)
    return _falling(flow_sigmas(_flow_times(config, steps)), 0.0, total)


@dataclass(frozen=True)
class SigmaFamily:
    """The noise levels of a family of samplers; a call gives those of the spacing that the model's config asks for.

    A call raises a ValueError where the number of steps is not in 1 ... `num_train_timesteps` (some families take
    less), or where the config asks for a training step past the last one.
    """

    own: Callable[..., Sigmas]
    """A `SigmasFn` for models with a noise schedule of betas; it has an argument `eta`, too, where `takes_eta`."""
    flow: SigmasFn = flow_levels
    """The same for models of flow matching."""
    ends: EndsFn = training_ends
    """The levels between which the schedules karras, exponential and beta space theirs."""
    to_zero: bool = True
    """Whether the last step of those schedules ends at sigma 0; otherwise it stays at their lowest level."""
    takes_eta: bool = False
    from_k_diffusion: bool = False
    """Whether it is that of k-diffusion's samplers, which start from other noise; see `samplers.starts_at_sigma`."""

    def __call__(self, config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
        """The levels of so many steps."""
        return (self.flow if schedule.flow else self.own)(config, schedule, steps)

    def with_eta(self, eta: float) -> "SigmaFamily":
        """The family at this eta, where its levels depend on it."""
        return replace(self, own=partial(self.own, eta=eta)) if self.takes_eta else self


def _model(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    total = config.num_train_timesteps
    _check_steps(steps, total)
    t = timesteps(config.timestep_spacing, total, steps, config.steps_offset)
    _check_start(config, t, steps)
    t_next = t - total // steps
    final = 0.0 if config.set_alpha_to_one else schedule.sigmas[0]
    sigmas_next = np.where(t_next >= 0, schedule.sigmas[np.maximum(t_next, 0)], final)
    return Sigmas(_pad(schedule.sigmas[t], total), _pad(sigmas_next, total))


def _pndm(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    total = config.num_train_timesteps
    _check_steps(steps, total - 1)
    sigmas = MODEL(config, schedule, steps)
    if steps == 1:
        return sigmas
    second = sigmas.sigmas[1]  # where the first step ends; its repetition reads x there, and ends there once more
    return Sigmas(*(_pad(np.insert(levels[:steps], 1, second), total) for levels in sigmas))


def _ddpm(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    sigmas = np.asarray(MODEL(config, schedule, steps).sigmas[:steps], np.float64)
    return _falling(sigmas, 0.0, config.num_train_timesteps)


def _k_diffusion(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    total = config.num_train_timesteps
    _check_steps(steps, total)
    return _falling(_k_levels(config, schedule, steps), _last(config, schedule), total)


def _k_ends(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> tuple[float, float]:
    levels = _k_levels(config, schedule, steps)
    return levels[0], levels[-1]


def _k_levels(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Falling:
    total = config.num_train_timesteps
    if config.timestep_spacing == "linspace" and steps > 1:
        t = np.linspace(0, total - 1, steps)[::-1]
    else:
        t = timesteps(config.timestep_spacing, total, steps, config.steps_offset)
    _check_start(config, t, steps)
    return np.interp(t, np.arange(total), schedule.sigmas)


def _dpm_solver(config: SchedulerConfig, schedule: NoiseSchedule, steps: int, to_zero: bool = True) -> Sigmas:
    total = config.num_train_timesteps
    _check_steps(steps, total - 1)
    more = 0 if config.timestep_spacing == "trailing" else 1
    t = timesteps(config.timestep_spacing, total, steps + more, config.steps_offset)[:steps]
    _check_start(config, t, steps)
    return _falling(schedule.sigmas[t], _last(config, schedule) if to_zero else schedule.sigmas[0], total)


def _lcm(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    sigmas, total = schedule.sigmas[_distilled(config, steps)], config.num_train_timesteps
    return Sigmas(_pad(sigmas, total), _pad(np.zeros_like(sigmas), total))


def _tcd(config: SchedulerConfig, schedule: NoiseSchedule, steps: int, eta: float = 0.0) -> Sigmas:
    t, total = _distilled(config, steps), config.num_train_timesteps
    low = np.floor(np.float32(1 - eta) * np.append(t[1:], 0).astype(np.float32)).astype(int)
    return Sigmas(_pad(schedule.sigmas[t], total), _pad(schedule.sigmas[low], total))


def _distilled(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Training steps, falling: `steps` of the 50 that consistency distillation takes (Luo et al. 2023, section 4.3)."""
    total = config.num_train_timesteps
    originals = min(50, total)
    _check_steps(steps, originals)
    t = (np.arange(originals, 0, -1) * (total // originals)) - 1
    return t[np.floor(np.linspace(0, originals, steps, endpoint=False)).astype(int)]


def _refuse_flow(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    raise ValueError(
        "The samplers lcm and tcd are for models distilled from a noise schedule, not for flow matching; use euler."
    )


MODEL = SigmaFamily(_model)
"""The levels of DDIMScheduler. Every step goes down by num_train_timesteps // steps, also where the spacing's steps
differ from that (linspace, and trailing with a number of steps that does not divide): this is diffusers' rule."""
PNDM = SigmaFamily(_pndm, flow=_pndm)
"""The levels of `MODEL` with the first step taken twice, as by PNDMScheduler with skip_prk_steps: one step more."""
DDPM = SigmaFamily(_ddpm)
"""The levels of DDPMScheduler: those that `MODEL` reads; each step ends at the next one's level, and the last at 0."""
K_DIFFUSION = SigmaFamily(_k_diffusion, ends=_k_ends, from_k_diffusion=True)
"""The levels of EulerDiscreteScheduler and the others from k-diffusion; linspace does not round to whole steps."""
DPM_SOLVER = SigmaFamily(_dpm_solver, flow=partial(flow_levels, spare=1))
"""The levels of DPMSolverMultistepScheduler and the others of one call a step: of steps + 1 evenly spaced training
steps the lowest is left out, and the last step ends at 0."""
DEIS = SigmaFamily(partial(_dpm_solver, to_zero=False), flow=partial(flow_levels, spare=1), to_zero=False)
"""The levels of `DPM_SOLVER`, which DEISMultistepScheduler ends at the first training level."""
LCM = SigmaFamily(_lcm, flow=_refuse_flow)
"""The levels of LCMScheduler: 1 to 50 of the 50 that consistency models were distilled at; each step ends at 0."""
TCD = SigmaFamily(_tcd, flow=_refuse_flow, takes_eta=True)
"""The levels of TCDScheduler, those of `LCM`; step i ends (1 - eta) of the way in t from 0 to the next one's level.
eta is the paper's gamma: 0 is deterministic, and with 1 every step goes to t = 0."""


# Spacings between two levels ------------------------------------------------------------------------------------------

# (highest, lowest, how many) -> falling levels, both ends among them.
SpacingFn = Callable[[float, float, int], Falling]


def karras(top: float, bottom: float, steps: int) -> Falling:
    """Even in sigma^(1/7): most levels where images take shape (Karras et al. 2022, eq. 5)."""
    return np.linspace(top ** (1 / 7), bottom ** (1 / 7), steps) ** 7


def exponential(top: float, bottom: float, steps: int) -> Falling:
    """Even in log sigma."""
    return np.exp(np.linspace(np.log(top), np.log(bottom), steps))


def beta(top: float, bottom: float, steps: int) -> Falling:
    """Quantiles of Beta(0.6, 0.6): dense at both ends (Lee et al. 2024)."""
    return bottom + betaincinv(0.6, 0.6, np.linspace(1, 0, steps)) * (top - bottom)


# Schedules by name ----------------------------------------------------------------------------------------------------


def spaced(spacing_fn: SpacingFn, family: SigmaFamily) -> SigmasFn:
    """Levels between the family's ends; for flow matching, the spacing is that of the times."""

    def make(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
        total = config.num_train_timesteps
        _check_steps(steps, total)
        if schedule.flow:
            times = _flow_times(config, steps)
            return _falling(flow_sigmas(spacing_fn(times[0], times[-1], steps)), 0.0, total)
        top, bottom = family.ends(config, schedule, steps)
        if config.rescale_betas_zero_snr and steps > 1 and top == schedule.sigmas[-1]:
            # No spacing starts from pure noise. The first step goes where one that is even in t would, and the spacing
            # starts there.
            second = schedule.sigmas[total - 1 - total // steps]
            sigmas = np.append(top, spacing_fn(second, bottom, steps - 1))
        else:
            sigmas = spacing_fn(top, bottom, steps)
        to_zero = family.to_zero and config.final_sigmas_type == "zero"
        return _falling(sigmas, 0.0 if to_zero else min(sigmas[-1], bottom), total)

    return make


def sgm_uniform(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    """Levels even in the training step, of which there are steps + 1 with the last at sigma 0, as in Stability's
    generative-models. Between two training steps, log sigma is linear."""
    total = config.num_train_timesteps
    _check_steps(steps, total)
    if schedule.flow:
        return _falling(flow_sigmas(_flow_times(config, steps + 1)[:-1]), 0.0, total)
    t = np.linspace(total - 1, 0, steps + 1)[:-1]
    return _falling(np.exp(np.interp(t, np.arange(total), np.log(schedule.sigmas))), 0.0, total)


# For Stable Diffusion 1.x and 2.x (Sabour et al. 2024, as published with the paper).
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(config: SchedulerConfig, schedule: NoiseSchedule, steps: int) -> Sigmas:
    """The ten steps optimised for Stable Diffusion (Sabour et al. 2024); other numbers interpolate in log sigma.

    Raises:
        ValueError: when the model has other noise levels.
    """
    total = config.num_train_timesteps
    _check_steps(steps, total)
    ends = training_ends(config, schedule, steps)
    if not np.allclose(ends, (ALIGNED[0], ALIGNED[-1]), rtol=0.02):
        raise ValueError(
            f"The schedule 'align_your_steps' is for Stable Diffusion's noise levels, {ALIGNED[0]} to {ALIGNED[-1]}; "
            f"this model has {ends[0]:.3g} to {ends[1]:.3g}, so use 'karras'."
        )
    places = np.linspace(0, len(ALIGNED) - 1, steps + 1)[:-1]
    return _falling(np.exp(np.interp(places, np.arange(len(ALIGNED)), np.log(ALIGNED))), 0.0, total)


def trailing(family: SigmaFamily) -> SigmasFn:
    """The family's levels with timestep_spacing "trailing", which begins in the noisiest one (Lin et al. 2024)."""
    return lambda config, schedule, steps: family(replace(config, timestep_spacing="trailing"), schedule, steps)


SCHEDULES: dict[str, Callable[[SigmaFamily], SigmasFn]] = {
    "model": lambda family: family,
    "trailing": trailing,
    "karras": lambda family: spaced(karras, family),
    "exponential": lambda family: spaced(exponential, family),
    "beta": lambda family: spaced(beta, family),
    "sgm_uniform": lambda _: sgm_uniform,
    "align_your_steps": lambda _: align_your_steps,
}
"""How each name makes levels for a family; "model" is the spacing that the model's config asks for."""


# Parts ----------------------------------------------------------------------------------------------------------------


def _flow_times(config: SchedulerConfig, steps: int) -> Falling:
    """Times from 1 evenly down to the first training level's, shifted (once more, as diffusers does)."""
    first = shifted(np.array([1 / config.num_train_timesteps]), config.shift)[0]
    return shifted(np.linspace(1, first, steps), config.shift)


def _last(config: SchedulerConfig, schedule: NoiseSchedule) -> float:
    """Where the last step ends, by the config."""
    return 0.0 if config.final_sigmas_type == "zero" else float(schedule.sigmas[0])


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}; it must be a whole number from 1 to {most}.")


def _check_start(config: SchedulerConfig, t: np.ndarray, steps: int) -> None:
    last = config.num_train_timesteps - 1
    if t[0] > last:
        raise ValueError(
            f"{steps} steps with steps_offset {config.steps_offset} start at training step {t[0]}, past the last one, "
            f"{last}; use fewer steps."
        )
    if config.prediction_type == "epsilon" and config.rescale_betas_zero_snr and t[0] == last:
        raise ValueError(
            "The noise schedule ends in pure noise (rescale_betas_zero_snr), from which an epsilon prediction tells "
            "nothing; use timestep_spacing 'leading' or a v_prediction model."
        )


def _falling(sigmas: Falling, last: float, total: int) -> Sigmas:
    """Each step ends at the next one's level, and the last one at `last`."""
    return Sigmas(_pad(sigmas, total), _pad(np.append(sigmas[1:], last), total))


def timesteps(spacing: str, total: int, steps: int, offset: int = 0) -> np.ndarray:
    """Training steps, falling, as diffusers spaces them (Lin et al. 2024, table 2); `offset` is for leading only.

    One step is the last training step, whatever the spacing: by leading and linspace, as diffusers has them, it would
    start from pure noise at the lowest level.
    """
    if steps == 1:
        return np.array([total - 1])
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + offset
    return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1


def _pad(levels: np.ndarray, length: int) -> Float32[np.ndarray, " n"]:
    return np.pad(levels, (0, length - len(levels))).astype(np.float32)
