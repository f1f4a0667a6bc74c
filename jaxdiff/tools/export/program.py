"""The whole way from tokens and seeds to pixels, as a function of arrays alone, and its export."""

import re
from inspect import unwrap
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.generation.network import Inputs
from jaxdiff.generation.programs import Program, decode, denoise, encode_prompts, keys_and_noise
from jaxdiff.nn.attention import portable
from jaxdiff.runtime.programs import KERNELS
from jaxdiff.sampling.loop import begin
from jaxdiff.sampling.samplers import SAMPLERS, count_steps, first_state, make_sigmas
from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.types import Params, Tokens

Arrays = dict[str, Any]


class Input(NamedTuple):
    """An argument of the program."""

    shape: tuple[int | str, ...]
    """b, t and n stand for the batch, a prompt's tokens, and the padded number of noise levels."""
    dtype: str
    about: str


INPUTS = {
    "ids": Input(("b", 2, "t"), "int32", "tokens of the negative prompt and the prompt, with start, end, padding"),
    "token_weights": Input(("b", 2, "t"), "float32", "how much each token counts; 1 takes it as it is"),
    "seeds": Input(("b",), "uint32", "each image's own, from which its noise is drawn"),
    "sigmas": Input(("n",), "float32", "where each step begins, in sigma of x_0 + sigma eps; then zeros"),
    "sigmas_next": Input(("n",), "float32", "where it ends; then zeros"),
    "steps": Input((), "int32", "how many levels there are"),
    "guidance": Input((), "float32", "how hard to follow the prompt; 1 is the model's own answer to it"),
    "guidance_rescale": Input((), "float32", "how much of the contrast that guidance adds is taken back, 0 to 1"),
    "apg_eta": Input((), "float32", "how much is left of the guidance along the image itself, 1 is all"),
    "apg_norm_threshold": Input((), "float32", "the largest norm of the guidance's direction; infinity is none"),
    "eta": Input((), "float32", "the share of fresh noise at each step, 0 to 1"),
}


def inputs_of(program: Program, batch: int, length: int) -> dict[str, Input]:
    """The arguments that a program has, with their shapes in numbers."""
    sides = {"b": batch, "t": length, "n": program.scheduler.num_train_timesteps}
    return {
        name: entry._replace(shape=tuple(sides.get(side, side) for side in entry.shape))  # pyright: ignore
        for name, entry in INPUTS.items()
        if name != "eta" or "eta" in SAMPLERS[program.sampler].options
    }


def draw(
    weights: Arrays, inputs: Arrays, *, program: Program, shape: tuple[int, int, int], empty: np.ndarray, at_sigma: bool
) -> dict[str, Array]:  # fmt: skip
    """`jaxdiff.Pipeline` without what is Python's: no checks, no files, no tokenizer.

    Args:
        weights: the params of text encoder, denoiser and decoder by names such as "denoiser/conv_in/kernel".
        inputs: as `INPUTS` has them.
        program: networks and settings.
        shape: height, width and channels of a latent.
        empty: the tokens of the empty prompt.
        at_sigma: whether sampling starts from sigma * noise.

    Returns:
        "images", uint8 [b, height, width, 3], and "finite", bool [b]: whether each is an image.
    """
    params = nested(weights)
    ids, token_weights = (jnp.asarray(inputs[name])[:, None, :, None] for name in ("ids", "token_weights"))
    b = len(ids)
    tokens = Tokens(ids, token_weights, jnp.asarray(empty))
    conditioning = unwrap(encode_prompts)((params["text_encoder"],), (tokens,), program=program)
    keys, noise = keys_and_noise(inputs["seeds"], shape)
    guidance = Guidance(*(inputs[name] for name in ("guidance", "guidance_rescale", "apg_eta", "apg_norm_threshold")))
    sigmas = Sigmas(inputs["sigmas"], inputs["sigmas_next"])
    state = unwrap(denoise)(
        params["denoiser"],
        Inputs(conditioning, jnp.ones((b, 1, 1, 1, 1, 1)), jnp.zeros((b, 1))),
        jax.vmap(begin)(first_state(noise, sigmas, at_sigma)),
        keys,
        sigmas,
        jnp.int32(0),
        inputs["steps"],
        guidance,
        inputs.get("eta", jnp.float32(0)),
        program=program,
    )
    images = unwrap(decode)(params["vae"], state.x, program=program)
    return {"images": images, "finite": jnp.isfinite(state.x).all((1, 2, 3))}


def export(
    weights: Arrays,
    inputs: dict[str, Input],
    *,
    program: Program,
    shape: tuple[int, int, int],
    empty: np.ndarray,
    at_sigma: bool,
    platforms: tuple[str, ...],
    kernels: bool,
) -> jax.export.Exported:
    """`draw` as StableHLO: arguments are `weights` (arrays, or their shapes) and `inputs`, each in the order of its
    names; nothing that is not used is left out.

    Raises:
        ValueError: where a kernel cannot be lowered for the platforms.
    """

    def whole(weights: Arrays, inputs: Arrays) -> dict[str, Array]:
        return draw(weights, inputs, program=program, shape=shape, empty=empty, at_sigma=at_sigma)

    allowed = [jax.export.DisabledSafetyCheck.custom_call(kernel) for kernel in KERNELS] if kernels else []
    arguments = {name: jax.ShapeDtypeStruct(entry.shape, jnp.dtype(entry.dtype)) for name, entry in inputs.items()}
    limit = "jax_traceback_in_locations_limit"
    before = jax.config.values[limit]
    try:
        jax.config.update(limit, 0)  # where the sources lie on this machine is nobody's business
        with portable(not kernels):
            jitted = jax.jit(whole, keep_unused=True)
            return jax.export.export(jitted, platforms=platforms, disabled_checks=allowed)(weights, arguments)
    finally:
        jax.config.update(limit, before)


def custom_calls(exported: jax.export.Exported) -> list[str]:
    """What the program asks of a platform beside StableHLO's own operations."""
    return sorted(set(re.findall(r"stablehlo\.custom_call @\"?([^\s\"(]+)", exported.mlir_module())))


def all_levels(program: Program, schedule_name: str) -> dict[str, np.ndarray]:
    """The noise levels for every number of steps that the sampler can take on the schedule, one after the other.

    Returns:
        "sigmas" and "sigmas_next", in which those of n steps lie from "ends"[n - 1] to "ends"[n].
    """
    schedule, total = make_schedule(program.scheduler), program.scheduler.num_train_timesteps
    grids: list[Sigmas] = []
    nothing, told = Sigmas(np.zeros(0, np.float32), np.zeros(0, np.float32)), ""
    for steps in range(1, total + 1):
        try:
            levels = make_sigmas(program.sampler, schedule_name, program.scheduler, schedule, steps)
            n = count_steps(levels)
            grids.append(Sigmas(*(np.asarray(part)[:n] for part in levels)))
        except ValueError as error:
            grids.append(nothing)
            told = str(error)
    if not any(len(levels.sigmas) for levels in grids):
        raise ValueError(told)
    sigmas, sigmas_next = (np.concatenate(parts).astype(np.float32) for parts in zip(*grids, strict=True))
    ends = np.cumsum([0, *(len(levels.sigmas) for levels in grids)]).astype(np.int32)
    return {"sigmas": sigmas, "sigmas_next": sigmas_next, "ends": ends}


def nested(weights: Arrays) -> Params:
    """Names such as "denoiser/conv_in/kernel" as a tree."""
    tree: Params = {}
    for name, leaf in weights.items():
        *modules, last = name.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = leaf
    return tree
