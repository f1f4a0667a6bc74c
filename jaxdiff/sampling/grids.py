"""Which noise levels to visit.

A sampler belongs to a family of diffusers' schedulers that take the same training steps from the same config:
`model_grid` (DDIM and its kin), `k_grid` (those of k-diffusion), `dpm_grid` (DPM-Solver and its kin), `lcm_grid`,
`tcd_grid`. The other grids of `GRIDS` put the levels between a family's ends otherwise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Float64
from scipy.special import betaincinv

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import Schedule, flow_sigmas, shifted

Levels = Float32[np.ndarray, " n"] | Float32[Array, " n"]
Falling = Float64[np.ndarray, " n"]


class Grid(NamedTuple):
    """Step i reads x at level `sigmas[i]` and leaves it at `sigmas_next[i]`; padded, so that its length is no constant.

    Usually `sigmas_next[i]` is `sigmas[i + 1]`. diffusers' DDIM does not always go on from where it arrived (see
    `model_grid`), and the network's input, x / sqrt(1 + sigma^2), is what is carried over.
    """

    sigmas: Levels
    sigmas_next: Levels


def model_grid(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """The levels that diffusers' DDIMScheduler visits under the same config, padded to `num_train_timesteps`.

    For flow matching they are those of its FlowMatchEulerDiscreteScheduler, whose steps DDIM then takes.

    Every step goes down by num_train_timesteps // steps, also where the spacing's steps differ from that (linspace,
    and trailing with a number of steps that does not divide): this is diffusers' rule, kept to draw its pictures.

    Raises:
        ValueError: when `steps` is not in 1 ... `num_train_timesteps`, or the config asks for a step past the last one.
    """
    total = config.num_train_timesteps
    _check_steps(steps, total)
    if config.prediction_type == "flow_prediction":
        return _falling(_flow_levels(config, steps), 0.0, total)
    t = timesteps(config.timestep_spacing, total, steps, config.steps_offset)
    _check_start(config, t, steps)
    t_next = t - total // steps
    final = 0.0 if config.set_alpha_to_one else schedule.sigmas[0]
    sigmas_next = np.where(t_next >= 0, schedule.sigmas[np.maximum(t_next, 0)], final)
    return Grid(_pad(schedule.sigmas[t], total), _pad(sigmas_next, total))


def pndm_grid(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """Those of `model_grid`, but the first step is gone twice, as by PNDMScheduler with skip_prk_steps: one more."""
    total = config.num_train_timesteps
    _check_steps(steps, total - 1)
    grid = model_grid(config, schedule, steps)
    if steps == 1:
        return grid
    second = grid.sigmas[1]  # once more, the first step ends here, with what the model says here
    return Grid(*(_pad(np.insert(levels[:steps], 1, second), total) for levels in grid))


def ddpm_grid(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """The levels of DDPMScheduler: those of `model_grid`, but each step goes to the next one's, and the last to 0."""
    total = config.num_train_timesteps
    return _falling(np.asarray(model_grid(config, schedule, steps).sigmas[:steps], np.float64), 0.0, total)


def k_grid(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """The levels of EulerDiscreteScheduler and the others from k-diffusion; linspace does not round."""
    total = config.num_train_timesteps
    _check_steps(steps, total)
    return _falling(_k_levels(config, schedule, steps), 0.0, total)


def dpm_grid(config: SchedulerConfig, schedule: Schedule, steps: int, last: float = 0.0) -> Grid:
    """The levels of DPMSolverMultistepScheduler and the others of one call a step, ending at `last`.

    They space steps + 1 training steps and leave the lowest to the end.
    """
    total = config.num_train_timesteps
    _check_steps(steps, total - 1)
    return _falling(_dpm_levels(config, schedule, steps), last, total)


def deis_grid(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """`dpm_grid`, which DEISMultistepScheduler ends at the first training level."""
    flow = config.prediction_type == "flow_prediction"
    return dpm_grid(config, schedule, steps, last=0.0 if flow else schedule.sigmas[0])


def lcm_grid(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """The levels of LCMScheduler: some of the 50 that consistency models were distilled at; each step goes to 0."""
    sigmas = schedule.sigmas[_distilled(config, steps)]
    total = config.num_train_timesteps
    return Grid(_pad(sigmas, total), _pad(np.zeros_like(sigmas), total))


def tcd_grid(config: SchedulerConfig, schedule: Schedule, steps: int, gamma: float = 0.0) -> Grid:
    """The levels of TCDScheduler; step i ends (1 - gamma) of the way in t down from the next one's level to 0.

    Args:
        config: the model's.
        schedule: made of it.
        steps: from 1 to 50.
        gamma: 0 is deterministic, 1 goes all the way to t = 0 and back up (diffusers calls it eta).
    """
    t = _distilled(config, steps)
    low = np.floor(np.float32(1 - gamma) * np.append(t[1:], 0).astype(np.float32)).astype(int)
    total = config.num_train_timesteps
    return Grid(_pad(schedule.sigmas[t], total), _pad(schedule.sigmas[low], total))


# Spacings between two levels ------------------------------------------------------------------------------------------

# (highest, lowest, how many) -> falling levels, both ends among them.
SpacingFn = Callable[[float, float, int], Falling]


def karras(top: float, bottom: float, steps: int) -> Falling:
    """Even in sigma^(1/7): most levels where pictures take shape (Karras et al. 2022, eq. 5)."""
    return np.linspace(top ** (1 / 7), bottom ** (1 / 7), steps) ** 7


def exponential(top: float, bottom: float, steps: int) -> Falling:
    """Even in log sigma."""
    return np.exp(np.linspace(np.log(top), np.log(bottom), steps))


def beta(top: float, bottom: float, steps: int) -> Falling:
    """Quantiles of Beta(0.6, 0.6): dense at both ends (Lee et al. 2024)."""
    return bottom + betaincinv(0.6, 0.6, np.linspace(1, 0, steps)) * (top - bottom)


# Grids by name --------------------------------------------------------------------------------------------------------

# (config, schedule, steps) -> Grid.
GridFn = Callable[[SchedulerConfig, Schedule, int], Grid]


def spaced(spacing_fn: SpacingFn, family: GridFn) -> GridFn:
    """A grid between the ends that diffusers takes for the family: k-diffusion's own first and last level, or else the
    first and last training level. For flow matching, it is the times that are spaced so."""

    def make(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
        total = config.num_train_timesteps
        _check_steps(steps, total)
        if config.prediction_type == "flow_prediction":
            times = _flow_times(config, steps)
            return _falling(flow_sigmas(spacing_fn(times[0], times[-1], steps)), 0.0, total)
        ends = _k_levels(config, schedule, steps) if family is k_grid else schedule.sigmas[::-1]
        if config.rescale_betas_zero_snr and steps > 1 and ends[0] == schedule.sigmas[-1]:
            # From pure noise, at no finite level, one step goes where an even step in t would; there it begins.
            second = schedule.sigmas[total - 1 - total // steps]
            sigmas = np.append(ends[0], spacing_fn(second, ends[-1], steps - 1))
        else:
            sigmas = spacing_fn(ends[0], ends[-1], steps)
        # DEISMultistepScheduler stays at its last level for one step more.
        return _falling(sigmas, sigmas[-1] if family is deis_grid else 0.0, total)

    return make


def sgm_uniform(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """Even in the training step, steps + 1 of them, the last left to sigma 0; as Stability's generative-models, and
    those who took it from there, do. Between two training steps, log sigma is a line."""
    total = config.num_train_timesteps
    _check_steps(steps, total)
    if config.prediction_type == "flow_prediction":
        return _falling(flow_sigmas(_flow_times(config, steps + 1)[:-1]), 0.0, total)
    t = np.linspace(total - 1, 0, steps + 1)[:-1]
    return _falling(np.exp(np.interp(t, np.arange(total), np.log(schedule.sigmas))), 0.0, total)


# For Stable Diffusion 1.x and 2.x (Sabour et al. 2024, as published with the paper).
ALIGNED = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(config: SchedulerConfig, schedule: Schedule, steps: int) -> Grid:
    """The ten steps optimised for Stable Diffusion (Sabour et al. 2024); other numbers interpolate in log sigma.

    Raises:
        ValueError: when the model has other noise levels.
    """
    total = config.num_train_timesteps
    _check_steps(steps, total)
    ends = schedule.sigmas[-1], schedule.sigmas[0]
    if config.prediction_type == "flow_prediction" or not np.allclose(ends, (ALIGNED[0], ALIGNED[-1]), rtol=0.02):
        raise ValueError(f"The grid 'align_your_steps' is for Stable Diffusion's noise levels, {ALIGNED[0]} to "
                         f"{ALIGNED[-1]}; this model has {ends[0]:.3g} to {ends[1]:.3g}, so use 'karras'.")  # fmt: skip
    places = np.linspace(0, len(ALIGNED) - 1, steps + 1)[:-1]
    return _falling(np.exp(np.interp(places, np.arange(len(ALIGNED)), np.log(ALIGNED))), 0.0, total)


def trailing(family: GridFn) -> GridFn:
    """The family's levels with timestep_spacing "trailing", which begins in the noisiest one (Lin et al. 2024)."""
    return lambda config, schedule, steps: family(replace(config, timestep_spacing="trailing"), schedule, steps)


# family -> GridFn; "model" is the spacing that the model's config asks for.
GRIDS: dict[str, Callable[[GridFn], GridFn]] = {
    "model": lambda family: family,
    "trailing": trailing,
    "karras": lambda family: spaced(karras, family),
    "exponential": lambda family: spaced(exponential, family),
    "beta": lambda family: spaced(beta, family),
    "sgm_uniform": lambda _: sgm_uniform,
    "align_your_steps": lambda _: align_your_steps,
}


# Parts ----------------------------------------------------------------------------------------------------------------


def _flow_times(config: SchedulerConfig, steps: int) -> Falling:
    """Times from 1 evenly down to the first training level's, shifted (once more, as diffusers does)."""
    first = shifted(np.array([1 / config.num_train_timesteps]), config.shift)[0]
    return shifted(np.linspace(1, first, steps), config.shift)


def _flow_levels(config: SchedulerConfig, steps: int) -> Falling:
    return flow_sigmas(_flow_times(config, steps))


def _k_levels(config: SchedulerConfig, schedule: Schedule, steps: int) -> Falling:
    if config.prediction_type == "flow_prediction":
        return _flow_levels(config, steps)
    total = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        t = np.linspace(0, total - 1, steps)[::-1]
    else:
        t = timesteps(config.timestep_spacing, total, steps, config.steps_offset)
    _check_start(config, t, steps)
    return np.interp(t, np.arange(total), schedule.sigmas)


def _dpm_levels(config: SchedulerConfig, schedule: Schedule, steps: int) -> Falling:
    if config.prediction_type == "flow_prediction":
        return _flow_levels(config, steps)
    more = 0 if config.timestep_spacing == "trailing" else 1
    t = timesteps(config.timestep_spacing, config.num_train_timesteps, steps + more, config.steps_offset)[:steps]
    _check_start(config, t, steps)
    return schedule.sigmas[t]


def _distilled(config: SchedulerConfig, steps: int) -> np.ndarray:
    """Training steps, falling: `steps` of the 50 that consistency distillation takes (Luo et al. 2023, section 4.3)."""
    if config.prediction_type == "flow_prediction":
        raise ValueError("The samplers lcm and tcd are for models distilled from a noise schedule, not for flow "
                         "matching; use euler.")  # fmt: skip
    total = config.num_train_timesteps
    originals = min(50, total)
    _check_steps(steps, originals)
    t = (np.arange(originals, 0, -1) * (total // originals)) - 1
    return t[np.floor(np.linspace(0, originals, steps, endpoint=False)).astype(int)]


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}; it must be a whole number from 1 to {most}.")


def _check_start(config: SchedulerConfig, t: np.ndarray, steps: int) -> None:
    last = config.num_train_timesteps - 1
    if t[0] > last:
        raise ValueError(f"{steps} steps with steps_offset {config.steps_offset} start at training step {t[0]}, past "
                         f"the last one, {last}; use fewer steps.")  # fmt: skip
    if config.prediction_type == "epsilon" and config.rescale_betas_zero_snr and t[0] == last:
        raise ValueError("The schedule ends in pure noise (rescale_betas_zero_snr), from which an epsilon prediction "
                         "tells nothing; use timestep_spacing 'leading' or a v_prediction model.")  # fmt: skip


def _falling(sigmas: Falling, last: float, total: int) -> Grid:
    """Each step goes on to the next one's level, and the last one to `last`."""
    return Grid(_pad(sigmas, total), _pad(np.append(sigmas[1:], last), total))


def timesteps(spacing: str, total: int, steps: int, offset: int = 0) -> np.ndarray:
    """Training steps, falling, as diffusers spaces them (Lin et al. 2024, table 2); `offset` is for leading only."""
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + offset
    return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1


def _pad(levels: np.ndarray, length: int) -> Float32[np.ndarray, " n"]:
    return np.pad(levels, (0, length - len(levels))).astype(np.float32)
