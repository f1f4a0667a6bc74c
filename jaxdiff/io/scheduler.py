"""`scheduler/scheduler_config.json` of a model folder: its noise schedule, and the sampler that it names."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff.config import SchedulerConfig, load_json, to_dict
from jaxdiff.io.configs import read_values

logger = logging.getLogger(__name__)

MARK = {"_written_by": "jaxdiff"}
"""Stands in a JSON file of each folder that is ours to replace."""


class Scheduler(NamedTuple):
    """One of diffusers' scheduler classes."""

    sampler: str
    """The sampler that takes its steps."""
    defaults: Mapping[str, Any] = {}
    """What its file may leave out, where that differs from `SchedulerConfig`."""
    options: Mapping[str, Any] = {}
    """Options of its steps: the values that the sampler has."""
    left_out: Mapping[str, Any] = {}
    """What options are where the file leaves them out, if that is another value."""
    spaced: bool = False
    """Whether its options choose another schedule (see `SCHEDULES`)."""
    exact: bool = True
    """Whether the sampler takes the same steps."""


_NO_CLIP = {"clip_sample": False}
_LINSPACE = _NO_CLIP | {"timestep_spacing": "linspace"}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = _NO_CLIP | _BETAS | {"beta_schedule": "scaled_linear"}
_FLOW = _NO_CLIP | {"prediction_type": "flow_prediction"}
_DPM = {"solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf}  # fmt: skip
_UNIPC = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True,
          "disable_corrector": []}  # fmt: skip
_EULER = {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None}
SCHEDULERS = {
    "DDIMScheduler": Scheduler("ddim"),
    "DDIMParallelScheduler": Scheduler("ddim"),
    "DDPMScheduler": Scheduler("ddpm", {}, {"variance_type": "fixed_small"}),
    "DDPMParallelScheduler": Scheduler("ddpm", {}, {"variance_type": "fixed_small"}),
    "PNDMScheduler": Scheduler(
        "pndm", _NO_CLIP | {"set_alpha_to_one": False}, {"skip_prk_steps": True}, {"skip_prk_steps": False}
    ),
    "LMSDiscreteScheduler": Scheduler("lms", _LINSPACE, spaced=True),
    "EulerDiscreteScheduler": Scheduler("euler", _LINSPACE, _EULER, spaced=True),
    "EulerAncestralDiscreteScheduler": Scheduler("euler_ancestral", _LINSPACE),
    "DEISMultistepScheduler": Scheduler(
        "deis", _LINSPACE, {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho"}, spaced=True
    ),
    "DPMSolverMultistepScheduler": Scheduler("dpmpp_2m", _LINSPACE, _DPM, spaced=True),
    "DPMSolverSinglestepScheduler": Scheduler("dpmpp_2m", _LINSPACE, exact=False, spaced=True),
    "SASolverScheduler": Scheduler("dpmpp_2m_sde", _LINSPACE, exact=False, spaced=True),
    "DPMSolverSDEScheduler": Scheduler("dpmpp_sde", _LINSPACE | _BETAS, spaced=True),
    "UniPCMultistepScheduler": Scheduler("unipc", _LINSPACE, _UNIPC, spaced=True),
    "HeunDiscreteScheduler": Scheduler("heun", _LINSPACE | _BETAS, spaced=True),
    "KDPM2DiscreteScheduler": Scheduler("dpm2", _LINSPACE | _BETAS, spaced=True),
    "KDPM2AncestralDiscreteScheduler": Scheduler("dpm2_ancestral", _LINSPACE | _BETAS, spaced=True),
    "LCMScheduler": Scheduler("lcm", _DISTILLED, {"original_inference_steps": 50}),
    "TCDScheduler": Scheduler("tcd", _DISTILLED, {"original_inference_steps": 50}),
    "FlowMatchEulerDiscreteScheduler": Scheduler("euler", _FLOW, spaced=True),
    "FlowMatchHeunDiscreteScheduler": Scheduler("flow_heun", _FLOW),
}
_DPMS = "DEISMultistep DPMSolverMultistep DPMSolverSinglestep UniPCMultistep"
# Settings that some of the classes have, without "Scheduler" in the names of these. Where others' files have them, they
# are left out, as diffusers leaves them out. (TCDScheduler has thresholding, and its steps take no notice.)
SOME_HAVE = {
    "rescale_betas_zero_snr": "DDIM DDIMParallel DDPM DDPMParallel EulerDiscrete EulerAncestralDiscrete "
                              "DPMSolverMultistep UniPCMultistep LCM TCD",
    "final_sigmas_type": "EulerDiscrete DPMSolverMultistep DPMSolverSinglestep UniPCMultistep",
    "thresholding": f"DDIM DDIMParallel DDPM DDPMParallel LCM SASolver {_DPMS}",
    "use_flow_sigmas": f"SASolver {_DPMS}",
    "use_dynamic_shifting": f"FlowMatchEulerDiscrete {_DPMS}",
    "timestep_type": "EulerDiscrete",
}  # fmt: skip
# (algorithm_type, solver_order) of DPMSolverMultistepScheduler
DPM_SAMPLERS = {
    ("dpmsolver++", 2): "dpmpp_2m",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
SCHEDULES = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
# Betas that one class alone has.
_OWN_BETAS = {"sigmoid": "DDPMScheduler", "laplace": "DDPMScheduler", "exp": "HeunDiscreteScheduler"}
WRITTEN = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}
"""The classes that are written for a model's own sampler; for any other it is DDIM's."""
# What diffusers' StableDiffusionPipeline sets, whatever the scheduler's class and file say.
PIPELINE = {"steps_offset": 1, "clip_sample": False}
# Pipelines that set nothing.
_LITERAL = ("StableDiffusionXL", "StableDiffusionUpscale", "StableDiffusionImageVariation", "StableUnCLIP")
# How a scheduler takes its steps, and what plays no part in drawing.
_IGNORED = frozenset({
    "skip_prk_steps", "variance_type", "solver_order", "solver_type", "algorithm_type", "lower_order_final",
    "euler_at_final", "lambda_min_clipped", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas", "interpolation_type", "sigma_min", "sigma_max", "predict_x0", "disable_corrector", "solver_p",
    "flow_shift", "time_shift_type", "dynamic_thresholding_ratio", "sample_max_value", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "original_inference_steps", "timestep_scaling", "tensor_format",
    "noise_sampler_seed", "use_noise_sampler", "predict_epsilon", "predictor_order", "corrector_order",
})  # fmt: skip
# Thresholding is for pixels in [-1, 1], as diffusers says; latents would lose most of their range.
_ONLY: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "timestep_type": ("discrete",),
}


def read_scheduler(path: Path | str) -> SchedulerConfig:
    """The noise schedule of a folder, whichever of diffusers' schedulers of this family wrote it.

    `steps_offset` is 1 and `clip_sample` is off, as diffusers' StableDiffusionPipeline sets them whatever the file
    says, with a warning where it says otherwise. A folder of Stable Diffusion XL, or one that this package wrote, means
    what it says.

    Raises:
        ValueError: naming the file and, for a setting that is not supported, the field and its value.
    """
    file, values, cls, ours, literal = _load(path)
    known = SCHEDULERS[cls]
    if values.get("predict_epsilon") is False:
        logger.warning("%s: predict_epsilon is false, which diffusers reads no more; prediction_type counts.", file)
    if not ours:
        values = _own(file, values, cls)
    left_out = dict(known.defaults) | ({} if literal and not ours else PIPELINE)
    config = read_values(file, values, SchedulerConfig, _ONLY, _IGNORED, left_out)
    if literal or config.prediction_type == "flow_prediction":
        return config
    changed = {name: getattr(config, name) for name, value in PIPELINE.items() if getattr(config, name) != value}
    if changed:
        logger.warning(
            "%s: %s, which diffusers' StableDiffusionPipeline takes as %s; so does this package.",
            file,
            " and ".join(f"{name} is {value}" for name, value in changed.items()),
            " and ".join(str(PIPELINE[name]) for name in changed),
        )
    return replace(config, **PIPELINE)


def read_noising(folder: Path) -> SchedulerConfig:
    """The noise schedule by which an image that the denoiser reads is noised: the folder's `scheduler_config.json`.

    Raises:
        ValueError: as `read_scheduler`.
    """
    file = folder / "scheduler_config.json"
    values = load_json(file)
    if (cls := values.get("_class_name")) not in SCHEDULERS:
        raise ValueError(f"{file}: the scheduler's class (_class_name) is {json.dumps(cls)}; supported: "
                         f"{', '.join(SCHEDULERS)}.")  # fmt: skip
    values = _own(file, values, cls)
    return read_values(file, values, SchedulerConfig, _ONLY, _IGNORED, SCHEDULERS[cls].defaults)


def read_sampler(path: Path | str) -> dict[str, str]:
    """The sampler and the schedule that a folder of others names, as settings; nothing of a folder that we wrote.

    What its class can and the sampler cannot is named in a warning.

    Raises:
        ValueError: as `read_scheduler`.
    """
    file, values, cls, ours, _ = _load(path)
    if ours:
        return {}
    known = SCHEDULERS[cls]
    sampler, options = known.sampler, dict(known.options)
    if cls == "DPMSolverMultistepScheduler":
        kind = values.get("algorithm_type", "dpmsolver++"), values.get("solver_order", 2)
        sampler = DPM_SAMPLERS.get(kind, sampler)
        options |= {} if kind in DPM_SAMPLERS else {"algorithm_type": "dpmsolver++", "solver_order": 2}
    values = dict(known.left_out) | values
    missed = {name: values[name] for name, value in options.items() if values.get(name, value) != value}
    if missed or not known.exact:
        logger.warning(
            "%s: the sampler %s stands in for %s%s, which takes other steps; images may differ from diffusers'.",
            file,
            sampler,
            cls,
            " with" * bool(missed) + ",".join(f" {name} {value!r}" for name, value in missed.items()),
        )
    schedules = [schedule for name, schedule in SCHEDULES.items() if known.spaced and values.get(name)]
    return {"sampler": sampler} | ({"schedule": schedules[0]} if schedules else {})


def _own(file: Path, values: dict[str, Any], cls: str) -> dict[str, Any]:
    """The values that the class has."""
    strange = {name for name, classes in SOME_HAVE.items() if cls.removesuffix("Scheduler") not in classes.split()}
    asking = {
        name: value for name in sorted(strange) if (value := values.get(name)) not in (None, False, "zero", "discrete")
    }
    if asking:
        logger.warning("%s: %s has no %s; diffusers leaves that out, and so does this package.", file, cls,
                       " and no ".join(f"{name} ({json.dumps(value)})" for name, value in asking.items()))  # fmt: skip
    return {name: value for name, value in values.items() if name not in strange}


def scheduler_class(config: SchedulerConfig, sampler: str | None = None) -> str:
    """The diffusers scheduler that has this noise schedule, and takes the steps of a sampler if one does.

    Else it is diffusers' flow matching one, or DDIM, which has most betas.
    """
    if config.prediction_type == "flow_prediction":
        return "FlowMatchEulerDiscreteScheduler"
    return _OWN_BETAS.get(config.beta_schedule, WRITTEN.get(sampler or "", "DDIMScheduler"))


def scheduler_values(config: SchedulerConfig) -> dict[str, Any]:
    """The arguments of `scheduler_class` with which it has the noise schedule of `config`."""
    flow = config.prediction_type == "flow_prediction"
    names = {"num_train_timesteps", "shift"}
    off = {"final_sigmas_type": "zero", "trained_betas": None}
    left_out = {"shift"} | {name for name, value in off.items() if getattr(config, name) == value}
    return {name: v for name, v in to_dict(config).items() if (name in names if flow else name not in left_out)}


def noising_values(config: SchedulerConfig) -> dict[str, Any]:
    """The values of a `scheduler_config.json` that `read_noising` and diffusers' DDPMScheduler read."""
    names = {f.name for f in fields(config)} - {"shift", "final_sigmas_type", "set_alpha_to_one", "trained_betas"}
    return {"_class_name": "DDPMScheduler"} | {name: v for name, v in to_dict(config).items() if name in names}


def _load(path: Path | str) -> tuple[Path, dict[str, Any], str, bool, bool]:
    """The scheduler's file, its values, its class, whether this package wrote the model folder, and whether the values
    mean what they say."""
    file = Path(path) / "scheduler" / "scheduler_config.json"
    if not file.parent.is_dir():
        raise ValueError(f"{path} has no folder 'scheduler'; it is not a diffusers model folder, or only half of one.")
    values = load_json(file)
    # diffusers makes the class that the index names, whichever wrote the file.
    index = load_json(found) if (found := Path(path) / "model_index.json").is_file() else {}
    named = index.get("scheduler")
    own = values.get("_class_name", "DDIMScheduler")
    cls = named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else own
    if not isinstance(cls, str) or cls not in SCHEDULERS:
        raise ValueError(f"{file}: the scheduler's class (_class_name) is {cls!r}; supported: {', '.join(SCHEDULERS)}.")
    ours = MARK.items() <= index.items()
    return file, values, cls, ours, ours or str(index.get("_class_name", "")).startswith(_LITERAL)
