"""The samplers by name, and the noise levels that each can visit."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.config import SchedulerConfig, nearest
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.sampling.consistency import lcm, tcd
from jaxdiff.sampling.ddim import ddim, ddpm
from jaxdiff.sampling.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, unipc
from jaxdiff.sampling.euler import dpm2, dpm2_ancestral, euler, euler_ancestral, flow_heun, heun
from jaxdiff.sampling.inversion import edict
from jaxdiff.sampling.loop import StepFn
from jaxdiff.sampling.multistep import deis, lms, pndm
from jaxdiff.sampling.sigmas import (
    DDPM,
    DEIS,
    DPM_SOLVER,
    K_DIFFUSION,
    LCM,
    MODEL,
    PNDM,
    SCHEDULES,
    TCD,
    SigmaFamily,
    Sigmas,
)

AnyArray = Array | np.ndarray


class Sampler(NamedTuple):
    """A sampler and what it can be used with."""

    fn: Callable[..., StepFn]
    """A `SamplerFn` that takes `options`, too."""
    family: SigmaFamily
    """Its own noise levels."""
    options: tuple[str, ...] = ()
    """Which of "eta" and "clip" `fn` takes."""
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    """The names of the schedules that it can use."""
    reuses: bool = True
    """Whether it can reuse the network's deep features over some steps; few steps are too far apart for that."""


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, MODEL, ("eta", "clip")),
    "ddpm": Sampler(ddpm, DDPM, ("clip",)),
    "euler": Sampler(euler, K_DIFFUSION),
    "euler_ancestral": Sampler(euler_ancestral, K_DIFFUSION),
    "heun": Sampler(heun, K_DIFFUSION, ("clip",)),
    "flow_heun": Sampler(flow_heun, K_DIFFUSION),
    "dpm2": Sampler(dpm2, K_DIFFUSION),
    "dpm2_ancestral": Sampler(dpm2_ancestral, K_DIFFUSION),
    "lms": Sampler(lms, K_DIFFUSION),
    "pndm": Sampler(pndm, PNDM, (), ("model",)),
    "deis": Sampler(deis, DEIS),
    "dpmpp_2m": Sampler(dpmpp_2m, DPM_SOLVER),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, DPM_SOLVER),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, DPM_SOLVER),
    "dpmpp_sde": Sampler(dpmpp_sde, K_DIFFUSION),
    "unipc": Sampler(unipc, DPM_SOLVER),
    "lcm": Sampler(lcm, LCM, ("clip",), ("model",), reuses=False),
    "tcd": Sampler(tcd, TCD, (), ("model",), reuses=False),
    "edict": Sampler(edict, MODEL),
}
BUILT_IN = dict(SAMPLERS)
"""The samplers of this package; others may be added to `SAMPLERS`, or take their place there."""
WITH_ETA = tuple(name for name, entry in SAMPLERS.items() if "eta" in entry.options or entry.family.takes_eta)
"""The samplers with a share of noise, eta: ddim as an option, tcd for its levels."""


def check_sampler(sampler: object, schedule: object = "model", eta: float = 0.0, cache_interval: int = 1) -> None:
    """Checks that there is such a sampler, and that it can use the schedule, eta, and features kept for some steps.

    Raises:
        ValueError: in a sentence, where not.
    """
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ValueError(f"Unknown sampler {sampler!r}{nearest(str(sampler), list(SAMPLERS))}")
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise ValueError(f"Unknown schedule {schedule!r}{nearest(str(schedule), list(SCHEDULES))}")
    known = SAMPLERS[sampler].schedules
    if schedule not in known:
        raise ValueError(f"The sampler {sampler} cannot use the schedule {schedule!r}; it can use: {', '.join(known)}.")
    entry = SAMPLERS[sampler]
    if eta and "eta" not in entry.options and not entry.family.takes_eta:
        raise ValueError(
            f"eta is {eta:g}, which the sampler {sampler} does not take; it is for {' and '.join(WITH_ETA)}."
        )
    if cache_interval > 1 and not SAMPLERS[sampler].reuses:
        raise ValueError(
            f"cache_interval is {cache_interval}, which the sampler {sampler} cannot use: its few steps are far "
            "apart. Leave it at 1."
        )


def make_sigmas(
    sampler: str, schedule: str, config: SchedulerConfig, noise_schedule: NoiseSchedule, steps: int, eta: float = 0.0
) -> Sigmas:
    """The noise levels for one of `SAMPLERS` by one of `SCHEDULES`.

    Raises:
        ValueError: where the sampler cannot use the schedule or eta, or the model cannot take so many steps.
    """
    check_sampler(sampler, schedule, eta)
    family = SAMPLERS[sampler].family.with_eta(eta)
    return SCHEDULES[schedule](family)(config, noise_schedule, steps)


def starts_at_sigma(sampler: str, schedule: str, config: SchedulerConfig) -> bool:
    """Whether sampling starts from sigma * noise, as in k-diffusion, and not from sqrt(1 + sigma^2) * noise.

    That is the rule of diffusers' schedulers from k-diffusion where the spacing is trailing or linspace.
    """
    spacing = "trailing" if schedule == "trailing" else config.timestep_spacing
    flow = config.prediction_type == "flow_prediction"
    return SAMPLERS[sampler].family.from_k_diffusion and spacing != "leading" and not flow


def first_state(noise: AnyArray, sigmas: Sigmas, at_sigma: bool) -> Array:
    """Unit normal noise as the first `State.x`: itself, or sigma / sqrt(1 + sigma^2) of it (see `starts_at_sigma`)."""
    sigma = sigmas.sigmas[0]
    return jnp.asarray(noise) * (sigma / jnp.sqrt(1 + sigma**2)) if at_sigma else jnp.asarray(noise)


def count_steps(sigmas: Sigmas) -> int:
    """How many steps the levels are for; pndm takes one more than was asked for."""
    return int(np.count_nonzero(sigmas.sigmas))
