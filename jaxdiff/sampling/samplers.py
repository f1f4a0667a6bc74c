"""The samplers by name, and which noise levels each can visit."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxdiff.config import SchedulerConfig, nearest
from jaxdiff.diffusion.schedule import Schedule
from jaxdiff.sampling.consistency import lcm, tcd
from jaxdiff.sampling.ddim import ddim, ddpm
from jaxdiff.sampling.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde, unipc
from jaxdiff.sampling.euler import dpm2, dpm2_ancestral, euler, euler_ancestral, flow_heun, heun
from jaxdiff.sampling.grids import (
    GRIDS,
    Grid,
    GridFn,
    ddpm_grid,
    deis_grid,
    dpm_grid,
    k_grid,
    lcm_grid,
    model_grid,
    pndm_grid,
    tcd_grid,
)
from jaxdiff.sampling.inversion import edict
from jaxdiff.sampling.multistep import deis, lms, pndm
from jaxdiff.sampling.walk import State


class Sampler(NamedTuple):
    """A sampler and what may be asked of it."""

    fn: Callable[..., State]
    """Takes (denoise_fn, state, grid, noise_fn, *, start, stop), and `options`."""
    family: GridFn
    """Its own levels."""
    options: tuple[str, ...] = ()
    """Which of "eta" and "clip" it takes."""
    grids: tuple[str, ...] = tuple(GRIDS)
    reuses: bool = True
    """Whether the network's features may be kept over some steps; those of few steps are too far apart."""


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, model_grid, ("eta", "clip")),
    "ddpm": Sampler(ddpm, ddpm_grid, ("clip",)),
    "euler": Sampler(euler, k_grid),
    "euler_ancestral": Sampler(euler_ancestral, k_grid),
    "heun": Sampler(heun, k_grid, ("clip",)),
    "flow_heun": Sampler(flow_heun, k_grid),
    "dpm2": Sampler(dpm2, k_grid),
    "dpm2_ancestral": Sampler(dpm2_ancestral, k_grid),
    "lms": Sampler(lms, k_grid),
    "pndm": Sampler(pndm, pndm_grid, (), ("model",)),
    "deis": Sampler(deis, deis_grid),
    "dpmpp_2m": Sampler(dpmpp_2m, dpm_grid),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, dpm_grid),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, dpm_grid),
    "dpmpp_sde": Sampler(dpmpp_sde, k_grid),
    "unipc": Sampler(unipc, dpm_grid),
    "lcm": Sampler(lcm, lcm_grid, ("clip",), ("model",), reuses=False),
    "tcd": Sampler(tcd, tcd_grid, (), ("model",), reuses=False),
    "edict": Sampler(edict, model_grid),
}
WITH_ETA = ("ddim", "tcd")  # ddim takes it as an option, tcd as its grid's gamma


def check_sampler(sampler: object, grid: object = "model", eta: float = 0.0, cache_interval: int = 1) -> None:
    """Whether there is such a sampler, and it can use the grid and eta, and features kept for some steps.

    Raises:
        ValueError: in a sentence, where not.
    """
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ValueError(f"Unknown sampler {sampler!r}{nearest(str(sampler), list(SAMPLERS))}")
    if not isinstance(grid, str) or grid not in GRIDS:
        raise ValueError(f"Unknown grid {grid!r}{nearest(str(grid), list(GRIDS))}")
    grids = SAMPLERS[sampler].grids
    if grid not in grids:
        raise ValueError(f"The sampler {sampler} cannot use the grid {grid!r}; it can use: {', '.join(grids)}.")
    if eta and sampler not in WITH_ETA:
        raise ValueError(
            f"eta is {eta:g}, which the sampler {sampler} does not take; it is for {' and '.join(WITH_ETA)}."
        )
    if cache_interval > 1 and not SAMPLERS[sampler].reuses:
        raise ValueError(f"cache_interval is {cache_interval}, which the sampler {sampler} cannot use: its few steps "
                         "are far apart. Leave it at 1.")  # fmt: skip


def make_grid(
    sampler: str, grid: str, config: SchedulerConfig, schedule: Schedule, steps: int, eta: float = 0.0
) -> Grid:
    """The noise levels for one of `SAMPLERS` on one of `GRIDS`.

    Raises:
        ValueError: where the sampler cannot use the grid or eta, or the model cannot take so many steps.
    """
    check_sampler(sampler, grid, eta)
    family = SAMPLERS[sampler].family
    if family is tcd_grid:
        family = partial(tcd_grid, gamma=eta)
    return GRIDS[grid](family)(config, schedule, steps)


def count_steps(grid: Grid) -> int:
    """How many steps a grid has: pndm's is one longer than was asked for."""
    return int(np.count_nonzero(grid.sigmas))
