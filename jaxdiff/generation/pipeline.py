"""A model that draws: `pipe = jaxdiff.load(); images = pipe(["a red apple"])`."""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.families import Family
from jaxdiff.generation.canvas import check_size, image_size, latent_shape
from jaxdiff.generation.conditioning import begin_all, encode_latents, filled, make_inputs, seeded
from jaxdiff.generation.drawing import (
    Drawing,
    ModelInfo,
    check_read,
    checked_defaults,
    make_drawing,
    refiner_step,
    settled,
)
from jaxdiff.generation.network import Control, Inputs, Prepared
from jaxdiff.generation.programs import ImageReader, Program, decode, decode_preview, denoise, guess, prepare_once
from jaxdiff.generation.request import PER_IMAGE, SEVERAL, Request, by_current_names, floats, seed_number, shown
from jaxdiff.generation.weights import (
    CONTROL,
    IMAGE_ENCODER,
    IP_ADAPTER,
    PREVIEW,
    Memory,
    Weights,
    check_memory,
    step_roles,
)
from jaxdiff.io.images import feathered
from jaxdiff.io.single_file import is_single
from jaxdiff.model import EMBEDDED, Adapter, FileOptions, Model, check_dtype, merge_adapters, read_model
from jaxdiff.prompts.wildcards import Wildcards
from jaxdiff.runtime.memory import free_bytes, memory_bytes, resident_bytes, temporaries
from jaxdiff.runtime.mesh import make_mesh, on, spread
from jaxdiff.runtime.programs import begin, enable_compilation_cache, give_back_memory, kept
from jaxdiff.sampling.loop import State
from jaxdiff.sampling.samplers import BUILT_IN, SAMPLERS, count_steps, make_sigmas
from jaxdiff.types import DenoiseFn, Params

logger = logging.getLogger(__name__)
Images = UInt8[np.ndarray, "b h w 3"]
Latents = Float32[np.ndarray, "b h w c"]


_LESS = {
    "normal": 'memory="low" (--memory low), or a smaller size',
    "low": 'memory="lowest" (--memory lowest), or a smaller size',
    "lowest": "a smaller size, or fewer prompts at once",
}
"""What takes less, by how much memory is used now."""


def load(
    path: str | Path | None = None,
    dtype: str | None = None,
    devices: Sequence[Any] | None = None,
    adapters: Sequence[Adapter] = (),
    memory: Memory = "normal",
    *,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
    loras: Iterable[str | Path | tuple[str | Path, float]] = (),
    embeddings: Iterable[str | Path | tuple[str | Path, str]] = (),
    controls: Iterable[str | Path] = (),
    ip_adapters: Iterable[str | Path] = (),
    image_encoder: str | Path | None = None,
    preview: str | Path | None = None,
    refiner: str | Path | None = None,
    denoiser: str | Path | None = None,
    vae: str | Path | None = None,
) -> "Pipeline":
    """Reads a text-to-image model; programs are kept for the next process (see `enable_compilation_cache`).

    Args:
        path: a diffusers folder, a run directory of `train.py`, or a `.safetensors`, `.ckpt` or `.gguf` file in the
            original layout of Stable Diffusion 1, 2 or XL; None is the model that comes with the package.
        dtype: what the networks compute in, "float32" or "bfloat16"; None is float32 on CPUs, else bfloat16.
        devices: over which images are spread, `jax.local_devices()` for all here; None is the first alone.
        adapters: functions of the params by role, which are applied in order before anything is cast or placed. The
            arrays that they are given are views of files, and cannot be written to: they return others.
        memory: "low" keeps one network at a time, and its kernels in 16 bits: less than half the memory, about 1.4
            times the time, and a little accuracy. "lowest" has those of all but the autoencoder in 8 bits.
        tokenizer: for a single file, the model's or the refiner's, in CLIP's place: a folder with vocab.json and
            merges.txt, or a diffusers folder.
        prediction_type: for a single file, which does not say it, or for `denoiser`: "epsilon" or "v_prediction";
            None is epsilon for Stable Diffusion 1, and a guess, with a warning, for 2.
        ema: of a single file, takes the averaged weights of the denoiser.
        loras: files, or pairs of a file and a strength, such as ("flat.safetensors", 0.8); they come after `adapters`.
        embeddings: textual inversions, files or pairs of a file and what its word is called in prompts, such as
            ("learned_embeds.bin", "<my-cat>"); without a name it is the file's own.
        controls: ControlNets and T2I-Adapters, folders or files, which a request's `control_image` steers the model by.
        ip_adapters: files of IP-Adapters, by which a request's `image_prompt` stands beside its prompt.
        image_encoder: the folder of CLIP's vision tower that they read images by; None is the folder `image_encoder`
            beside the first of them.
        preview: the folder of a tiny autoencoder (TAESD), by which `Pipeline.preview` makes images.
        refiner: a model of the same latents that takes the last steps, such as Stable Diffusion XL's refiner; see
            `Request.refiner_start`.
        denoiser: a folder or a single file whose denoiser takes the place of the model's own, such as a GGUF file of
            a denoiser alone.
        vae: a folder or a single file whose autoencoder takes the place of the model's own.

    Raises:
        ValueError: in one sentence, when anything is missing, damaged or not supported.
    """
    check_dtype(dtype)
    check_memory(memory)
    enable_compilation_cache()
    of_model = prediction_type if denoiser is None else None  # it is the denoiser's
    options = FileOptions(None if tokenizer is None else Path(tokenizer), of_model, ema)
    files = is_single(EMBEDDED if path is None else path), refiner is not None and is_single(refiner)
    model = read_model(path, options=FileOptions() if files == (False, True) else options)
    if denoiser is not None:
        model = model.with_network("denoiser", denoiser, prediction_type)
    if vae is not None:
        model = model.with_network("vae", vae)
    if adapters:
        model = model.with_params(merge_adapters(model.params, adapters))
    for name, given, of in (
        ("loras", loras, "files, or of pairs of a file and a strength"),
        ("embeddings", embeddings, "files, or of pairs of a file and a word"),
        ("controls", controls, "folders or files"),
        ("ip_adapters", ip_adapters, "files"),
    ):
        if isinstance(given, str | Path):
            raise ValueError(f"{name} is {shown(given)}; give a list of {of}.")
    if loras := tuple(loras):
        model = model.with_loras(loras)
    if embeddings := tuple(embeddings):
        model = model.with_embeddings(embeddings)
    if controls := tuple(controls):
        model = model.with_controls(controls)
    if (ip_adapters := tuple(ip_adapters)) or image_encoder is not None:
        model = model.with_ip_adapters(ip_adapters, image_encoder)
    if preview is not None:
        model = model.with_preview(preview)
    second = None
    if refiner is not None:
        last = read_model(refiner, options=options if files[1] else FileOptions())
        second = Pipeline(last.with_embeddings(embeddings), dtype, devices, memory)
    return Pipeline(model, dtype, devices, memory, second)


class Pipeline:
    """Requests to images. `load` makes one from files; so does a `Model` in memory."""

    def __init__(
        self,
        model: Model,
        dtype: str | None = None,
        devices: Sequence[Any] | None = None,
        memory: Memory = "normal",
        refiner: "Pipeline | None" = None,
    ) -> None:
        """The params go to the default device, or to each of `devices`, when they are first used.

        Raises:
            ValueError: when the model's networks do not fit together, or a refiner has other latents.
        """
        self.model = model
        self.dtype = check_dtype(dtype)
        self.defaults = checked_defaults(model.defaults, model.scheduler)
        """The settings that stand in for those that a request leaves out."""
        self.networks = model.modules(self._jax_dtype)
        self._nets = tuple(self.networks.control_net(control.config, self._jax_dtype) for control in model.controls)
        self._reader = self._image_reader()
        self._mesh = None if devices is None or len(devices) < 2 else make_mesh(devices=devices)
        everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        params = model.params | {f"{CONTROL}{i}": control.params for i, control in enumerate(model.controls)}
        params |= {f"{IP_ADAPTER}{i}": adapter.params for i, adapter in enumerate(model.ip_adapters)}
        params |= {} if model.image_encoder is None else {IMAGE_ENCODER: model.image_encoder.params}
        tiny = model.preview
        self._tiny = None if tiny is None else self.networks.preview_net(tiny.config, self._jax_dtype)
        params |= {} if tiny is None else {PREVIEW: tiny.params}
        self.params = Weights(params, self._jax_dtype, everywhere, check_memory(memory))
        """As the networks take them, by role."""
        self.refiner = refiner
        """What takes the last steps."""
        if refiner is not None and _latents(refiner.networks) != _latents(self.networks):
            raise ValueError(
                f"The refiner {refiner.name!r} has other latents than {self.name!r}: scale, channels and pixels to "
                f"each are {_latents(refiner.networks)}, and not {_latents(self.networks)}; give one that was trained "
                "on the model's latents."
            )
        if refiner is not None and refiner.networks.beside is not None:
            raise ValueError(f"The refiner {refiner.name!r} reads a {refiner.networks.beside} beside latents; give one "
                             "that reads latents alone.")  # fmt: skip
        if model.noising is None and self.networks.image_noise((1, 1, 1)) is not None:
            raise ValueError(
                f"The model {self.name!r} reads an image with noise, and has no noise schedule for it "
                "(image_noising_scheduler or low_res_scheduler): it is not whole."
            )
        self._fitting: set[tuple[Any, tuple[int, ...]]] = set()
        self.info = ModelInfo(
            self.networks,
            model.scheduler,
            model.size,
            self._jax_dtype,
            self.defaults,
            self._nets,
            model.zero_empty,
            len(model.ip_adapters),
            None if model.image_encoder is None else model.image_encoder.pixels,
            model.noising,
        )
        """What requests need to know of the model."""

    @property
    def name(self) -> str:
        """The model's name, that of its folder."""
        return self.model.name

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels that the model was trained at, if it says."""
        return self.model.size

    @property
    def num_devices(self) -> int:
        """Devices that images are spread over: batches of a multiple of it keep all of them busy."""
        return 1 if self._mesh is None else self._mesh.size

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        seed: int | Sequence[int] = 0,
        *,
        wildcards: str | Path | None = None,
        progress: Callable[[int], object] | None = None,
        on_step: Callable[[int, Array], object] | None = None,
        **fields: Any,
    ) -> Images:
        """Draws one image for each prompt; image i depends on its prompt and its seed alone.

        Args:
            prompts: at least one; `jaxdiff.prompts` says what brackets, AND and __names__ in them mean.
            negative_prompt: what to steer away from; one for all, or one each.
            seed: from 0 to 2^32 - 1; image i has `seed + i`, or its own where there are several.
            wildcards: a folder of texts, NAME.txt for __NAME__ in a prompt.
            progress: called with the number of steps done, about ten times.
            on_step: called after each step, or each `cache_interval` of them, with the number of steps done and the
                guess of x_0 [b, h, w, c] that the step made; see `decode` and `preview`.
            fields: any other field of `Request`, such as steps, guidance and image; those of `PER_IMAGE` one for all
                images, or a list or an array with one for each.

        Raises:
            ValueError: in one sentence, for values out of range or of the wrong kind.
        """
        requests = self.requests(prompts, negative_prompt, seed, wildcards=wildcards, **fields)
        return self.draw(requests, progress=progress, on_step=on_step)

    def requests(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        seed: int | Sequence[int] = 0,
        *,
        wildcards: str | Path | None = None,
        **fields: Any,
    ) -> list[Request]:
        """The requests that a call with these arguments draws, one for each prompt."""
        if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
            raise ValueError(f"prompts is {shown(prompts)}; it must be text, or a list of texts.")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        b = len(prompts)
        if not b:
            raise ValueError("No prompt was given; give at least one.")
        fields = by_current_names(fields)
        if "prompt" in fields or ("negative_prompt" in fields and negative_prompt):
            raise ValueError("prompt and negative_prompt are given twice; give each once.")
        negative_prompt = fields.get("negative_prompt", "" if negative_prompt is None else negative_prompt)
        fields |= {"prompt": prompts, "negative_prompt": negative_prompt, "seed": seed}
        each = {name: _one_each(name, fields.pop(name), b) for name in PER_IMAGE if name in fields}
        if b > 1 and seed is not None and _depth(seed) == 0:  # the first image's, and all others' follow
            n = [Request(n=n).n for n in each.get("n", [1] * b)]
            each["seed"] = [seed_number("seed", seed) + sum(n[:i]) for i in range(b)]
        common = Request(**fields)
        requests = [replace(common, **{name: values[i] for name, values in each.items()}) for i in range(b)]
        if wildcards is not None:
            files = Wildcards(wildcards)
            requests = [filled(request, files, request.seed or 0) for request in singles(requests)]
        return requests

    def draw(
        self,
        requests: Sequence[Request],
        *,
        progress: Callable[[int], object] | None = None,
        on_step: Callable[[int, Array], object] | None = None,
    ) -> Images:
        """Draws requests that share all but the fields of `PER_IMAGE`, `n` images of each, in one batch.

        Args:
            requests: at least one.
            progress: as in a call.
            on_step: as in a call.

        Raises:
            ValueError: in one sentence, where a request does not fit the model, or they do not go together.
        """
        if not isinstance(requests, list | tuple) or not requests or not all(isinstance(r, Request) for r in requests):
            raise ValueError(f"requests is {shown(requests)}; give a list of one Request or more.")
        drawing = make_drawing(singles(requests), self.info)
        self._check_refiner(requests[0])
        program = self.program(drawing.settings)
        if self._mesh is None:
            self._decoder(jax.ShapeDtypeStruct((len(drawing.requests), *drawing.shape), jnp.float32), begin)
        inputs, state, keys = make_inputs(drawing, self.model.tokenizers, self.params, program)
        stop = drawing.steps if self.refiner is None else refiner_step(drawing, self.model.scheduler)
        first, callbacks = drawing.start, (progress, on_step)
        state = self._denoise(drawing, (first, max(first, stop)), program, inputs, state, keys, *callbacks)
        if self.refiner is not None and stop < drawing.steps:
            state = self.refiner._finish(drawing, max(first, stop), state, keys, *callbacks)
        if not np.isfinite(state.x).all():
            raise ValueError(
                f"The image has values that are not finite: {self.dtype} overflowed, with guidance "
                f"{drawing.settings.guidance:g}, sampler {drawing.settings.sampler} and schedule "
                f"{drawing.settings.schedule}. Use less guidance, or others of these; smaller latents, if you gave any."
            )
        logger.debug("steps done")
        latents = state.x if inputs.layout_above is None else state.x[:, 1]
        if inputs.mask is not None and inputs.known is not None:
            # The last level may be above 0, and what is kept still noisy there.
            latents = inputs.mask * latents + (1 - inputs.mask) * inputs.known
        images = self.decode(latents)
        if drawing.image is None or drawing.mask is None:
            return images
        drawn = np.stack([feathered(mask, drawing.settings.feather) for mask in drawing.mask])[..., None]
        mixed = np.round(drawn * images + (1 - drawn) * drawing.image).astype(np.uint8)
        return np.where(drawn == 0, drawing.image, mixed)

    def _finish(
        self,
        drawing: Drawing,
        start: int,
        state: State,
        keys: Array,
        progress: Callable[[int], object] | None,
        on_step: Callable[[int, Array], object] | None,
    ) -> State:
        """The last steps of another model's drawing, on its noise levels."""
        size = drawing.shape[1] * self.networks.factor, drawing.shape[0] * self.networks.factor
        own = make_drawing([request.without_adapters(size) for request in drawing.requests], self.info)
        own = replace(own, sigmas=drawing.sigmas, at_sigma=drawing.at_sigma, steps=drawing.steps)
        if own.mask is None:  # what the image said is in the state
            own = replace(own, image=None)
        program = self.program(own.settings)
        inputs, _, _ = make_inputs(own, self.model.tokenizers, self.params, program)
        return self._denoise(own, (start, own.steps), program, inputs, begin_all(state.x), keys, progress, on_step)

    def _check_refiner(self, request: Request) -> None:
        """Refuses what a request says of a refiner that is not there, or does not go with the one that is.

        Raises:
            ValueError: in one sentence.
        """
        if self.refiner is None and request.refiner_start is not None:
            raise ValueError("refiner_start is for a model with a refiner; load one (refiner=, --refiner), or leave "
                             "refiner_start out.")  # fmt: skip
        if self.refiner is not None and request.invert is not None:
            raise ValueError("invert finds the noise of one model; load it without a refiner.")
        check_read(request, [pipe.networks for pipe in (self, self.refiner) if pipe is not None])

    def program(self, request: Request) -> Program:
        """What the programs of a request are compiled for."""
        side = None if request.tile is None else request.tile // self.networks.factor
        tile = None if side is None else (side, side)
        name = request.sampler or self.defaults["sampler"]
        registered = None if SAMPLERS[name] is BUILT_IN.get(name) else SAMPLERS[name]
        nets = self._nets if request.control_image else ()
        return Program(
            self.networks, self.model.scheduler, name, tile, registered, None, nets, request.control_guess,
            self._reader if request.image_prompt else None,
        )  # fmt: skip

    def _image_reader(self) -> ImageReader | None:
        """The modules that make images prompts, where the model was loaded with any."""
        encoder, adapters = self.model.image_encoder, self.model.ip_adapters
        if encoder is None or not adapters:
            return None
        nets = tuple(self.networks.ip_adapter(one.config, encoder.config, self._jax_dtype) for one in adapters)
        return ImageReader(self.networks.image_encoder_net(encoder.config, self._jax_dtype), nets)

    def _denoise(
        self,
        drawing: Drawing,
        ends: tuple[int, int],
        program: Program,
        inputs: Inputs,
        state: State,
        keys: Array,
        progress: Callable[[int], object] | None,
        on_step: Callable[[int, Array], object] | None,
    ) -> State:
        """The steps from the first of `ends` to the other, in pieces where there are callbacks; taken in pieces the
        steps are the same."""
        settings, (first, steps) = drawing.settings, ends
        state = state._replace(memory=drawing.guidance.memory(jnp.zeros((len(drawing.requests), *drawing.shape))))
        interval = None if settings.cache_interval == 1 else np.int32(min(settings.cache_interval, steps))
        piece = 1 if on_step is not None else math.ceil((steps - first) / 10) if progress is not None else steps - first
        # Features that are kept for some steps are made where a piece starts.
        piece = settings.cache_interval * math.ceil(max(1, piece) / settings.cache_interval)
        mesh = self._mesh_for(len(keys))
        inputs, state, keys = spread((inputs, state, keys), mesh)

        def arguments(params: Sequence[Params], start: int, stop: int, state: State) -> tuple[Any, ...]:
            numbers = np.int32(start), np.int32(stop), drawing.guidance, np.float32(settings.eta), interval
            return params[0], inputs, state, keys, drawing.sigmas, *numbers, controls_of(drawing, params[1:])

        roles = step_roles(len(drawing.hints))
        with on(mesh):  # compiled before there are params: the compiler wants memory, too
            run = kept(denoise, *arguments([*map(self._like, roles)], first, steps, state), program=program)
        self._check_fits(run, (len(keys), *drawing.shape), roles)
        params = [self.params[role] for role in roles]

        def report(start: int, stop: int, state: State) -> None:
            done = min(stop, settings.steps or steps)
            if on_step is not None and stop > start:
                on_step(done, state.guess if inputs.layout_above is None else state.guess[:, 1])
            if progress is not None:
                state.x.block_until_ready()
                progress(done)

        taken = None
        for start in range(first, max(steps, first + 1), piece):
            stop = min(start + piece, steps)
            with on(mesh):
                state = run(*arguments(params, start, stop, state))
            if taken is not None:  # while the device takes the next steps
                report(*taken)
            taken = start, stop, state
        if taken is not None:
            report(*taken)
        return state

    def _check_fits(self, run: Any, shape: tuple[int, ...], roles: Sequence[str]) -> None:
        """Checks once for each program that steps and decoder have memory; systems kill a process without a word.

        Accelerators say themselves when theirs is short.

        Raises:
            ValueError: where this machine has less.
        """
        if jax.default_backend() != "cpu" or self._mesh is not None or (run, shape) in self._fitting:
            return
        decoder, memory = self._decoder(jax.ShapeDtypeStruct(shape, jnp.float32)), self.params.memory
        give_back_memory()
        there, free, total = resident_bytes(), free_bytes(), memory_bytes()
        if there is None or free is None:
            return
        steps = sum(map(self.params.missing_bytes, roles)) + temporaries(run)
        last = self.params.missing_bytes("vae") + temporaries(decoder)
        beside = sum(map(self.params.missing_bytes, roles)) if memory == "normal" else 0
        more = max(0, max(steps, beside + last) - self.params.passing_bytes())
        b, (h, w) = shape[0], (side * self.networks.factor for side in shape[1:3])
        told = (
            f"{b} x {w}x{h} pixels need about {more / 1e9:.2f} GB of memory "
            f"beside the {there / 1e9:.2f} GB that this process has, and {{}}; use " + _LESS[memory]
        )
        if there + more > total:
            raise ValueError(told.format(f"this machine has {total / 1e9:.2f} GB in all") + ".")
        if more > free:
            warnings.warn(told.format(f"{free / 1e9:.2f} GB are free") + ".", stacklevel=5)
        self._fitting.add((run, shape))

    def _mesh_for(self, b: int) -> Mesh | None:
        """The devices that a batch is spread over; None where their number does not divide it."""
        return self._mesh if self._mesh is not None and b % self._mesh.size == 0 else None

    # For loops of one's own -------------------------------------------------------------------------------------------

    def denoiser(
        self, prompts: str | Sequence[str], negative_prompt: str | Sequence[str] | None = "", **fields: Any
    ) -> DenoiseFn:
        """The model as a function (x, sigma) -> x_0, for prompts and guidance.

        x is x_0 + sigma * eps in latents at unit variance [b, h, w, c]: b for as many prompts, h and w the image's
        sides divided by `networks.factor`. sigma is one number above 0 for all. Prompts are encoded here, once, and so
        are the keys and values of cross-attention; calls compile once for each shape. It can be called in `jax.jit`,
        `jax.grad` and `jax.vmap`, and is itself a pytree: given to a jitted function as an argument, its params are
        arguments too, and not constants of the program.

        Args:
            prompts: one, or one for each image of the batch.
            negative_prompt: as in a call.
            fields: any other field of `Request` that changes a guess; image and mask inpaint.

        Raises:
            ValueError: as a call; for fields that only a loop over the denoiser has a use for, such as cache_interval.
        """
        if unused := sorted(OF_THE_LOOP & fields.keys()):
            raise ValueError(f"{unused[0]} is for the loop over the denoiser, and changes no guess; leave it out.")
        requests = singles(self.requests(prompts, negative_prompt, **fields))
        drawing = make_drawing(requests, self.info)
        check_read(requests[0], [self.networks])
        reads = drawing.edits or drawing.image_noise is not None
        if drawing.mask is None and not reads and (unused := sorted(OF_INPAINTING & fields.keys())):
            raise ValueError(f"{unused[0]} changes a guess only where a mask keeps a part of an image; leave it out.")
        program = self.program(drawing.settings)
        inputs, _, _ = make_inputs(drawing, self.model.tokenizers, self.params, program)
        params, *others = (self.params[role] for role in step_roles(len(drawing.hints)))
        controls = controls_of(drawing, others)
        prepared = prepare_once(params, inputs, controls, program=program)
        shape = len(drawing.requests), *drawing.shape
        return jax.tree_util.Partial(_Guess(program, shape), params, inputs, prepared, drawing.guidance, controls)

    def sigmas(
        self,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: float = 0.0,
    ) -> Float32[np.ndarray, " n"]:
        """The noise levels that a sampler visits, falling, and after them the level that its last step ends at."""
        given: Any = settled(Request(steps=steps, sampler=sampler, schedule=schedule, eta=eta), self.info)
        scheduler = self.model.scheduler
        sigmas = make_sigmas(given.sampler, given.schedule, scheduler, make_schedule(scheduler), given.steps, given.eta)
        n = count_steps(sigmas)
        return np.append(np.asarray(sigmas.sigmas)[:n], np.asarray(sigmas.sigmas_next)[n - 1])

    def noise(
        self,
        seed: int | Sequence[int] = 0,
        *,
        size: tuple[int, int] | None = None,
        rng: Literal["jax", "torch"] = "jax",
    ) -> Latents:
        """Unit normal noise [b, h, w, c] that a call with these seeds, size and rng starts from."""
        seeds: Any = [seed] if _depth(seed) == 0 else list(seed)  # pyright: ignore[reportArgumentType]
        if not seeds:
            raise ValueError("seed is an empty list; give at least one.")
        requests = [Request(seed=one, size=size, rng=rng) for one in seeds]
        shape = latent_shape(image_size(requests[0], self.networks, self.size), self.networks)
        return seeded([request.seed for request in requests], shape, rng, self.networks.image_noise(shape))[1]

    def encode(self, images: UInt8[np.ndarray, "b h2 w2 3"]) -> Float[Array, "b h w c"]:
        """Images to their most likely latents, at unit variance.

        Raises:
            ValueError: for another type or shape, or sides that are no multiples of `networks.factor`.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(f"images is {shown(images)}; it must be uint8 [b, height, width, 3].")
        check_size("The image", images.shape[2:0:-1], self.networks.factor)
        return encode_latents(images, self.params["vae"], Program(self.networks, self.model.scheduler))

    def decode(self, latents: Float[Array, "b h w c"] | np.ndarray) -> UInt8[np.ndarray, "b h2 w2 3"]:
        """Latents at unit variance to images.

        Raises:
            ValueError: for another shape.
        """
        channels = self.networks.latent_channels
        if np.ndim(latents) != 4 or not np.size(latents) or np.shape(latents)[-1] != channels:
            raise ValueError(f"latents have the shape {list(np.shape(latents))}; it must be [b, h, w, {channels}].")
        if not np.issubdtype(np.asarray(latents).dtype, np.floating) or not np.isfinite(np.asarray(latents)).all():
            raise ValueError(f"latents are {np.asarray(latents).dtype}, or not finite; they must be finite floats.")
        mesh = self._mesh_for(len(latents))
        with on(mesh):
            placed = spread(jnp.asarray(latents, jnp.float32), mesh)
            run = self._decoder(placed)
            return np.asarray(run(self.params["vae"], placed))

    def _decoder(self, latents: Any, get: Callable[..., Any] = kept) -> Callable[[Params, Array], Array]:
        """The decoder's program for latents, or for their shape; or it is begun (`get` is `begin`)."""
        program = Program(self.networks, self.model.scheduler)
        return get(decode, self._like("vae"), latents, program=program)

    def _like(self, role: str) -> Params:
        """What a network's programs are compiled for: shapes, which take no memory; on a mesh, its params."""
        return self.params.shapes(role) if self._mesh is None else self.params[role]

    def preview(self, latents: Float[Array, "b h w c"] | np.ndarray) -> Images:
        """Latents to images in next to no time: colours and shapes are right.

        With a tiny autoencoder (`load(preview=...)`) they have the result's size; else that of the latents, by one
        linear map, which is fitted to the decoder when it is first asked for.
        """
        channels, flat = self.networks.latent_channels, np.asarray(latents, np.float32)
        if flat.ndim != 4 or flat.shape[-1] != channels:
            raise ValueError(f"latents have the shape {list(flat.shape)}; it must be [b, h, w, {channels}].")
        if self._tiny is not None:
            return np.asarray(decode_preview(self.params[PREVIEW], jnp.asarray(flat), net=self._tiny))
        image = flat @ self._preview_weights[:-1] + self._preview_weights[-1]
        return np.clip(np.round(image), 0, 255).astype(np.uint8)

    @cached_property
    def _preview_weights(self) -> Float32[np.ndarray, "c2 3"]:
        """Least squares from a latent pixel to the mean colour that the decoder makes of it, and a constant."""
        side, channels = 16, self.networks.latent_channels
        rng = np.random.default_rng(0)
        patches = rng.standard_normal((4, 4, 4, channels)).repeat(side // 4, 1).repeat(side // 4, 2).astype(np.float32)
        images = self.decode(patches).astype(np.float32)
        factor = self.networks.factor
        colours = images.reshape(4, side, factor, side, factor, 3).mean((2, 4)).reshape(-1, 3)
        rows = np.append(patches.reshape(-1, channels), np.ones((4 * side**2, 1), np.float32), axis=1)
        return np.linalg.lstsq(rows, colours, rcond=None)[0].astype(np.float32)

    def save(self, path: str | Path, dtype: DTypeLike = np.float32) -> None:
        """Writes a folder that `load` and diffusers read; see `Model.save`."""
        self.model.save(path, dtype)

    @property
    def _jax_dtype(self) -> DTypeLike:
        return jnp.dtype(self.dtype)


def _latents(networks: Family) -> tuple[float, int, int]:
    """What two models have in common that one can go on with the other's latents."""
    return networks.latent_scale, networks.latent_channels, networks.factor


def singles(requests: Sequence[Request]) -> list[Request]:
    """A request for each image; those without a seed take the image's place among all."""
    images: list[Request] = []
    for request in requests:
        images += request.images(len(images))
    return images


def controls_of(drawing: Drawing, params: Sequence[Params]) -> tuple[Control, ...]:
    """What the control networks of a drawing are called with."""
    found = []
    for one, (scale, levels) in zip(params, drawing.control, strict=True):
        low, high = (None, None) if levels is None else (np.asarray(level, np.float32) for level in levels)
        found.append(Control(one, np.asarray(scale, np.float32), low, high))
    return tuple(found)


OF_THE_LOOP = {
    "n",
    "refiner_start",
    "strength",
    "eta",
    "invert",
    "keep_layout",
    "source_prompt",
    "cache_interval",
    "apg_momentum",
}
"""Fields that are for the steps, and not for a guess."""
OF_INPAINTING = {"image", "seed", "rng", "latents", "to_seed"}
"""Fields that a guess depends on where a part of an image is kept, by its pixels and their noise."""


class _Guess(NamedTuple):
    """The function that `Pipeline.denoiser` binds to its arrays."""

    program: Program
    shape: tuple[int, int, int, int]

    def __call__(
        self,
        params: Params,
        inputs: Inputs,
        prepared: Prepared,
        guidance: Guidance,
        controls: tuple[Control, ...],
        x: Any,
        sigma: Any,
    ) -> Float[Array, "b h w c"]:
        if np.shape(x) != self.shape or np.ndim(sigma):
            raise ValueError(
                f"x has the shape {list(np.shape(x))}, and sigma {list(np.shape(sigma))}; they must be "
                f"{list(self.shape)} and one number."
            )
        if not isinstance(sigma, jax.core.Tracer) and not 0 < floats(sigma) < math.inf:
            raise ValueError(f"sigma is {shown(sigma)}; it must be a finite number above 0.")
        x, sigma = jnp.asarray(x, jnp.float32), jnp.asarray(sigma, jnp.float32)
        return guess(params, inputs, prepared, x, sigma, guidance, controls, program=self.program)


def _depth(value: Any) -> int:
    """How many axes it has; of lists, as far as their first elements tell."""
    if isinstance(value, list | tuple):
        return 1 + (_depth(value[0]) if value else 0)
    return getattr(value, "ndim", 0)


def _one_each(name: str, value: Any, b: int) -> list[Any]:
    """A field's value for each of b images: one for all, or one each."""
    single = {"image": 3, "control_image": 3, "image_prompt": 3, "mask": 2, "depth": 2, "latents": 3}.get(name, 0)
    depth = _depth(value)
    if name in SEVERAL and isinstance(value, tuple):  # one for each network
        return [value] * b
    if isinstance(value, str | bytes | Path | None) or depth == single or not isinstance(value, Iterable):
        return [value] * b
    if hasattr(value, "ndim") and depth != single + 1:  # neither one nor one each: the field's check says what it is
        return [value] * b
    values = list(value)
    if len(values) != b:
        raise ValueError(f"There are {len(values)} of {name} for {b} prompts; give one, or one each.")
    return values
