"""Which noise levels to visit."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.schedule import Schedule, flow_sigmas, shifted

Levels = Float32[np.ndarray, " n"] | Float32[Array, " n"]


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
    if not 1 <= steps <= total:
        raise ValueError(f"steps is {steps}; it must be a whole number from 1 to {total}.")
    if config.prediction_type == "flow_prediction":
        return _flow_grid(config, steps)
    t = timesteps(config.timestep_spacing, total, steps, config.steps_offset)
    if t[0] >= total:
        raise ValueError(f"{steps} steps with steps_offset {config.steps_offset} start at training step {t[0]}, past "
                         f"the last one, {total - 1}; use fewer steps.")  # fmt: skip
    if config.prediction_type == "epsilon" and config.rescale_betas_zero_snr and t[0] == total - 1:
        raise ValueError("The schedule ends in pure noise (rescale_betas_zero_snr), from which an epsilon prediction "
                         "tells nothing; use timestep_spacing 'leading' or a v_prediction model.")  # fmt: skip
    t_next = t - total // steps
    final = 0.0 if config.set_alpha_to_one else schedule.sigmas[0]
    sigmas_next = np.where(t_next >= 0, schedule.sigmas[np.maximum(t_next, 0)], final)
    return Grid(_pad(schedule.sigmas[t], total), _pad(sigmas_next, total))


def _flow_grid(config: SchedulerConfig, steps: int) -> Grid:
    """Times from 1 evenly down to the first training level's, shifted (once more, as diffusers does), and then 0."""
    first = shifted(np.array([1 / config.num_train_timesteps]), config.shift)[0]
    sigmas = flow_sigmas(shifted(np.linspace(1, first, steps), config.shift))
    return Grid(*(_pad(levels, config.num_train_timesteps) for levels in (sigmas, np.append(sigmas[1:], 0))))


def timesteps(spacing: str, total: int, steps: int, offset: int = 0) -> np.ndarray:
    """Training steps, falling, as diffusers spaces them (Lin et al. 2024, table 2); `offset` is for leading only."""
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + offset
    return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1


def _pad(levels: np.ndarray, length: int) -> Float32[np.ndarray, " n"]:
    return np.pad(levels, (0, length - len(levels))).astype(np.float32)
