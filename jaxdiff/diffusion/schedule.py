"""Noise schedules: how much of the clean latent is left after each training step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float64

from jaxdiff.config import SchedulerConfig
from jaxdiff.diffusion.prediction import PREDICTIONS

# Zero-terminal-SNR leaves nothing of x_0 at the last step, and sigma infinite. This in place of 0 keeps it finite (1e6)
# and adds less than float32 resolves: diffusers, which has an exact zero there, draws the same images.
TERMINAL_ALPHA_BAR = 1e-12

# (the first beta, the last, how many) -> betas.
BetasFn = Callable[[float, float, int], Float64[np.ndarray, " t"]]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The training steps t = 0 ... T - 1, from nearly clean to nearly noise."""

    alpha_bar: Float64[np.ndarray, " t"]
    """Share of x_0 in the variance of x_0 + sigma * eps (Ho et al. 2020, eq. 4)."""
    flow: bool = False
    """Whether the levels are those of flow matching, sigma = t / (1 - t) for t in (0, 1]."""

    @property
    def sigmas(self) -> Float64[np.ndarray, " t"]:
        """Noise levels, rising, of x = x_0 + sigma * eps."""
        return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    @property
    def times(self) -> Float64[np.ndarray, " t"]:
        """The time that the network is told for each level: its number, or for flow matching T * t."""
        steps = len(self.alpha_bar)
        return steps * self.sigmas / (1 + self.sigmas) if self.flow else np.arange(steps, dtype=np.float64)


@cache
def make_schedule(config: SchedulerConfig) -> NoiseSchedule:
    """The noise schedule that diffusers makes of the same `scheduler_config.json`."""
    steps = config.num_train_timesteps
    if PREDICTIONS[config.prediction_type].flow:
        sigmas = flow_sigmas(shifted(np.arange(1, steps + 1) / steps, config.shift))
        return NoiseSchedule(1 / (1 + sigmas**2), flow=True)
    betas = BETAS[config.beta_schedule](config.beta_start, config.beta_end, steps)
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas)
    alpha_bar = np.cumprod(1 - betas)
    if config.rescale_betas_zero_snr:
        alpha_bar = zero_terminal_snr(alpha_bar)
    return NoiseSchedule(alpha_bar)


def zero_terminal_snr(alpha_bar: Float64[np.ndarray, " t"]) -> Float64[np.ndarray, " t"]:
    """Shifts sqrt(alpha_bar) to end near 0 and scales it to start where it did (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(alpha_bar)
    rest = ((root[:-1] - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.append(rest, min(TERMINAL_ALPHA_BAR, *rest[-1:] / 2))


def shifted(t: Float64[np.ndarray, " t"], shift: float) -> Float64[np.ndarray, " t"]:
    """Times on the line moved towards noise, as larger images need it (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def flow_sigmas(t: Float64[np.ndarray, " t"]) -> Float64[np.ndarray, " t"]:
    """t / (1 - t), the levels of (1 - t) x_0 + t eps; pure noise is a large number, as with zero terminal SNR."""
    return t / np.maximum(1 - t, TERMINAL_ALPHA_BAR**0.5)


def linear(start: float, end: float, steps: int) -> Float64[np.ndarray, " t"]:
    """Evenly spaced betas (Ho et al. 2020, section 4)."""
    return np.linspace(start, end, steps)


def scaled_linear(start: float, end: float, steps: int) -> Float64[np.ndarray, " t"]:
    """Betas with evenly spaced square roots, as Stable Diffusion was trained with (Rombach et al. 2022)."""
    return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2


def sigmoid(start: float, end: float, steps: int) -> Float64[np.ndarray, " t"]:
    """Betas on a sigmoid over [-6, 6], from start to end (Xu et al. 2022, GeoDiff)."""
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))


def squaredcos_cap_v2(t: Float64[np.ndarray, " t"]) -> Float64[np.ndarray, " t"]:
    """A squared cosine (Nichol & Dhariwal 2021, eq. 17)."""
    return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace(t: Float64[np.ndarray, " t"]) -> Float64[np.ndarray, " t"]:
    """The square root of the share of x_0 where log SNR is Laplace's quantile function (Hang et al. 2024, table 1), as
    diffusers has it."""
    log_snr = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
    return np.sqrt(1 / (1 + np.exp(-log_snr)))


def exp(t: Float64[np.ndarray, " t"]) -> Float64[np.ndarray, " t"]:
    """Falls by exp(-12)."""
    return np.exp(-12 * t)


def falling(alpha_bar: Callable[[Float64[np.ndarray, " t"]], Float64[np.ndarray, " t"]]) -> BetasFn:
    """The betas, under 0.999, of an alpha_bar that is a function of time in [0, 1]; it needs no start and no end."""

    def betas(start: float, end: float, steps: int) -> Float64[np.ndarray, " t"]:
        values = alpha_bar(np.arange(steps + 1) / steps)
        return np.minimum(1 - values[1:] / values[:-1], 0.999)

    return betas


BETAS: dict[str, BetasFn] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "sigmoid": sigmoid,
    "squaredcos_cap_v2": falling(squaredcos_cap_v2),
    "laplace": falling(laplace),
    "exp": falling(exp),
}
