"""A text-to-image model that can be called: loading, checking what a user asks for, saving."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import UInt8

from jaxdiff import build
from jaxdiff.arguments import fits, floats, masks, one_each, pictures, placed, seeds, texts
from jaxdiff.config import load_json
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.generate import INVERSIONS, Program, Scene, outline, text_to_image
from jaxdiff.io.convert import leaves
from jaxdiff.io.folder import Folder, NetworkConfig, read_folder, write_folder
from jaxdiff.io.images import feathered
from jaxdiff.io.programs import enable_compilation_cache, kept, remembered
from jaxdiff.io.weights import check_params
from jaxdiff.nn.conv import prepare
from jaxdiff.prompts.encode import Words
from jaxdiff.prompts.wildcards import Wildcards
from jaxdiff.sampling.loop import State
from jaxdiff.sampling.samplers import SAMPLERS, check_sampler, count_steps, make_sigmas
from jaxdiff.sampling.sigmas import Sigmas
from jaxdiff.scenes import Request, prepare_scene
from jaxdiff.settings import Settings, settings
from jaxdiff.sharding import batch_sharding, make_mesh
from jaxdiff.types import Params

EMBEDDED = Path(__file__).parent / "assets" / "emoji"
DTYPES = ("float32", "bfloat16")


def load(
    path: str | Path | None = None, dtype: str | None = None, devices: Sequence[Any] | None = None
) -> "Pipeline":  # fmt: skip
    """Reads a text-to-image model; programs are kept for the next process (see `enable_compilation_cache`).

    Args:
        path: a diffusers folder, or a run directory of `train.py`; None is the model that comes with the package.
        dtype: what the networks compute in, "float32" or "bfloat16"; None is float32 on CPUs, else bfloat16.
        devices: over which pictures are spread, `jax.local_devices()` for all here; None is the first alone.

    Raises:
        ValueError: in one sentence, when anything is missing, damaged or not supported.
    """
    path = EMBEDDED if path is None else Path(path)
    _check_dtype(dtype)
    enable_compilation_cache()
    folder = path
    if not (path / "model_index.json").exists() and _is_run(path):
        folder = path / "export"
        if not folder.exists():
            raise ValueError(f"{path} is a run that has not exported a model yet; train on to its first evaluation.")
        if not (folder / "model_index.json").exists():
            raise ValueError(f"{path} is a run that has exported no whole text-to-image model; "
                             "train one with a DiffusionTask, until its first evaluation.")  # fmt: skip
    model = read_folder(folder)
    for name in ("unet", "vae", "text_encoder"):
        check_params(model.params[name], _expected(name, getattr(model, name)), folder / name)
    return Pipeline(model, dtype, name=path.resolve().name, devices=devices)


class Pipeline:
    """Prompts to pictures. `load` makes one; so does a `Folder` in memory."""

    def __init__(
        self, model: Folder, dtype: str | None = None, name: str = "", devices: Sequence[Any] | None = None
    ) -> None:
        """Puts the params on the default device, or on each of `devices`, in the type that they are computed in.

        Raises:
            ValueError: when the model's parts do not fit together.
        """
        _check_dtype(dtype)
        _check_parts(model)
        self.name = name
        self.dtype: str = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        length = model.text_encoder.max_position_embeddings
        self.tokenizer: Any = (
            Tokenizer.load(model.tokenizer, length) if isinstance(model.tokenizer, Path) else model.tokenizer
        )
        if len(self.tokenizer) > model.text_encoder.vocab_size:
            raise ValueError(f"The tokenizer has {len(self.tokenizer)} tokens, more than the text encoder's vocab_size "
                             f"{model.text_encoder.vocab_size}.")  # fmt: skip
        host = {name: model.params[name] for name in ("text_encoder", "unet", "vae")}
        self._mesh = None if devices is None or len(devices) < 2 else make_mesh(devices=devices)
        everywhere = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        self.params = on_device(host, self._jax_dtype, everywhere)
        # `save` needs no file of the folder read, and no second copy of params that are exact on the device.
        exact = self.params if self.dtype == "float32" and jax.default_backend() != "cpu" else host
        self.model = replace(model, tokenizer=self.tokenizer, params=exact)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height that the model was trained at, if it says."""
        latent = self.model.unet.sample_size
        if latent is None:
            return None
        side = latent * self.model.vae.factor
        return side, side

    @property
    def spread(self) -> int:
        """Over how many devices pictures are spread: batches of a multiple of it keep all of them busy."""
        return 1 if self._mesh is None else self._mesh.size

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        seed: int | Sequence[int] = 0,
        *,
        latents: ArrayLike | None = None,
        image: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        source_prompt: str | Sequence[str] | None = "",
        regions: Sequence[tuple[str, Any]] = (),
        to_prompts: str | Sequence[str] | None = None,
        to_seed: int | Sequence[int] | None = None,
        share: ArrayLike | Sequence[SupportsFloat] = 0.0,
        wildcards: str | Path | None = None,
        progress: Callable[[int], object] | None = None,
        watch: Callable[[int, UInt8[np.ndarray, "b h w 3"]], object] | None = None,
        **turned: Any,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Draws one picture for each prompt; image i depends on its prompt and its seed alone.

        Args:
            prompts: at least one; `jaxdiff.prompts` says what brackets, AND and __names__ in them mean.
            negative_prompt: what to steer away from; one for all, or one each; None is "".
            seed: from 0 to 2^32 - 1; image i has `seed + i`, or its own where there are several.
            latents: unit normal [b, h, w, c] in place of the seeds' starting noise.
            image: uint8 [h, w, 3] or one for each prompt, to begin from (see `strength` and `invert`).
            mask: numbers [h, w] or one for each prompt: where it is 1 the image is drawn anew, and where it is 0 its
                pixels are returned as they are.
            source_prompt: for `invert`, what is in the image; one for all, or one each.
            regions: (prompt, where) for parts of the picture; where is a box (left, top, right, bottom) in shares of
                the sides, or numbers [h, w] from 0 to 1. The rest is the prompt's (Bar-Tal et al. 2023).
            to_prompts: second prompts, one for all or one each, and
            to_seed: second seeds, towards which
            share: the picture goes: 0 is the first, 1 the second; one for all, or one each. Prompts mix on a line,
                noise on the sphere.
            wildcards: a folder of texts, NAME.txt for __NAME__ in a prompt.
            progress: is told the number of steps done, about ten times.
            watch: is told the number of steps done and the model's guesses of the pictures, after each step, or each
                `cache_interval` of them; each guess takes as long as a step.
            turned: any of `jaxdiff.settings.Settings`, by name: steps, guidance, sampler and so on.

        Raises:
            ValueError: in one sentence, for values out of range or of the wrong kind.
        """
        request = self._request(
            prompts, negative_prompt, seed, latents, image, mask, source_prompt, regions, to_prompts, to_seed, share,
            wildcards, settings(turned),
        )  # fmt: skip
        program = self.program(request.settings.sampler, request.settings.window)
        scene, state, keys = prepare_scene(request, self.tokenizer, self.params, program)
        images = self._draw(request, program, scene, state, keys, progress, watch)
        if request.image is None or request.mask is None:
            return images
        drawn = np.stack([feathered(mask, request.settings.feather) for mask in request.mask])[..., None]
        mixed = np.round(drawn * images + (1 - drawn) * request.image).astype(np.uint8)
        return np.where(drawn == 0, request.image, mixed)

    def _request(
        self, prompts: Any, negative_prompt: Any, seed: Any, latents: Any, image: Any, mask: Any, source_prompt: Any,
        regions: Any, to_prompts: Any, to_seed: Any, share: Any, wildcards: Any, ask: Settings,
    ) -> Request:  # fmt: skip
        """What is asked for, checked in the order in which a user can mend it."""
        model = self.model
        prompts = texts(prompts)
        b = len(prompts)
        if not b:
            raise ValueError("No prompt was given; give at least one.")
        negatives = one_each("negative prompts", negative_prompt, b)
        sources = one_each("source prompts", source_prompt, b)
        own_seeds, regions = seeds("seed", seed, b), placed(regions)
        shares = floats(share)
        if shares.shape not in ((), (b,)) or not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"share is {share!r}; it must lie from 0 to 1: one for all, or one for each prompt.")
        if ask.invert is not None:
            ask = replace(ask, sampler=_way_back(ask))
        elif ask.keep or any(sources):
            raise ValueError("keep and source_prompt are for an image whose noise is found; say how, by invert.")
        check_sampler(ask.sampler, ask.grid, ask.eta, ask.cache_interval)
        if image is None and (mask is not None or ask.strength is not None or ask.invert is not None):
            raise ValueError("mask, strength and invert are for an image; give one.")
        if ask.enlarge > 1 and (image is None or mask is not None or ask.invert is not None):
            raise ValueError("enlarge is for an image that is drawn on as a whole; give one, without mask and invert.")
        if ask.invert is not None and (mask is not None or latents is not None):
            raise ValueError("invert finds the noise of the whole image; leave out mask and latents.")
        if self._inpaints and mask is None:
            raise ValueError("This model is for inpainting; give an image and a mask.")
        if ask.window is not None and ask.cache_interval > 1:
            raise ValueError("cache_interval keeps the features of one window alone; leave out window, or it.")
        if ask.noise == "torch" and ask.sampler == "dpmpp_sde":
            raise ValueError("noise 'torch' is not for dpmpp_sde, whose noise PyTorch draws by another rule.")

        levels = make_sigmas(ask.sampler, ask.grid, model.scheduler, make_schedule(model.scheduler), ask.steps, ask.eta)
        given = None if latents is None else floats(latents)
        image = None if image is None else pictures("image", image, b)
        height, width, _ = shape = self._latent_shape(ask, b, given, image)
        _check_memory(model, b, shape, self._jax_dtype)
        factor = model.vae.factor
        return Request(
            settings=ask,
            words=[Words(*pair, tuple(text for text, _ in regions)) for pair in zip(prompts, negatives, strict=True)],
            seeds=own_seeds,
            shape=shape,
            levels=levels,
            steps=count_steps(levels),
            latents=given,
            image=image,
            mask=None if mask is None else masks(mask, b, (width * factor, height * factor)),
            sources=sources if ask.invert is not None else (),
            regions=[where for _, where in regions],
            targets=None if to_prompts is None else one_each("second prompts", to_prompts, b),
            other_seeds=None if to_seed is None else seeds("to_seed", to_seed, b),
            shares=np.broadcast_to(shares, b),
            wildcards=None if wildcards is None else Wildcards(Path(wildcards)),
        )

    def _draw(
        self, request: Request, program: Program, scene: Scene, state: State, keys: Any,
        progress: Callable[[int], object] | None, watch: Callable[[int, np.ndarray], object] | None,
    ) -> UInt8[np.ndarray, "b h w 3"]:  # fmt: skip
        """All steps, in pieces where someone looks on: the pieces are the same program and give the same picture."""
        ask, steps, begun = request.settings, request.steps, request.begun
        guidance = Guidance(
            scale=np.float32(ask.guidance),
            rescale=np.float32(ask.rescale),
            parallel=np.float32(ask.parallel),
            limit=np.float32(np.inf if ask.limit is None else ask.limit),
            low=None if ask.guidance_interval is None else np.float32(ask.guidance_interval[0]),
            high=None if ask.guidance_interval is None else np.float32(ask.guidance_interval[1]),
            perturbed=None if ask.perturbed is None else np.float32(ask.perturbed),
        )
        every = None if ask.cache_interval == 1 else np.int32(min(ask.cache_interval, steps))
        piece = max(1, steps - begun) if progress is None else math.ceil((steps - begun) / 10)
        piece = 1 if watch is not None else piece
        piece = max(
            1, ask.cache_interval * math.ceil(piece / ask.cache_interval)
        )  # features are made at a piece's start
        images: Any = None
        for start in range(begun, max(steps, begun + 1), piece):
            stop = min(start + piece, steps)
            ends = np.int32(start), np.int32(stop), np.int32(steps)
            arguments = scene, state, keys, request.levels, *ends, guidance, np.float32(ask.eta), every
            state, images = self._run(arguments, program)
            if watch is not None and stop < steps:
                # One step of DDIM from here to sigma 0 arrives at the guess.
                here = np.asarray(request.levels.sigmas_next)[stop - 1 : stop]
                levels = Sigmas(*(np.pad(level, (0, len(request.levels.sigmas) - 1)) for level in (here, here * 0)))
                ends = np.int32(0), np.int32(1), np.int32(1)
                arguments = scene, state, keys, levels, *ends, guidance, np.float32(0), None
                watch(stop, np.asarray(self._run(arguments, replace(program, sampler="ddim"))[1]))
            if progress is not None:
                state.x.block_until_ready()
                progress(min(stop, ask.steps))
        if not np.isfinite(state.x).all():
            raise ValueError(f"The picture came to nothing: with guidance {ask.guidance:g}, {self.dtype} overflowed. "
                             "Use less guidance, or another sampler or grid.")  # fmt: skip
        if watch is not None:
            watch(ask.steps, np.asarray(images))
        return np.asarray(images)

    def _run(self, arguments: tuple[Any, ...], program: Program) -> tuple[State, Any]:
        params = {name: self.params[name] for name in ("unet", "vae")}
        scene, state, keys, *rest = arguments
        if self._mesh is not None and len(state.x) % self._mesh.size == 0:
            spread = partial(jax.device_put, device=batch_sharding(self._mesh))
            rows = scene._replace(keep=None)
            scene = jax.tree.map(spread, rows)._replace(keep=scene.keep)
            arguments = params, scene, jax.tree.map(spread, state), spread(keys), *rest
            with jax.set_mesh(self._mesh):  # attention's kernels are split over it
                return text_to_image(*arguments, program=program)
        arguments = params, *arguments
        if not SAMPLERS[program.sampler].fn.__module__.startswith("jaxdiff."):  # of others, the source is not known
            return text_to_image(*arguments, program=program)
        return kept(text_to_image, outline, *arguments, program=program)(*arguments)

    def program(self, sampler: str, window: int | None = None) -> Program:
        """What pictures are drawn by: the networks, with a sampler and a window in pixels (see `Settings`).

        Raises:
            ValueError: where the model cannot look through such a window.
        """
        model = self.model
        if window is not None:
            fits(
                "window",
                (window, window),
                model.vae.factor * 2 ** (len(model.unet.block_out_channels) - 1),
                "what the network halves to whole numbers",
            )
            window //= model.vae.factor
        return Program(
            text_encoder=build.text_encoder(model.text_encoder, self._jax_dtype),
            unet=build.unet(model.unet, self._jax_dtype),
            vae=build.vae(model.vae, self._jax_dtype),
            scheduler=model.scheduler,
            scaling_factor=model.vae.scaling_factor,
            sampler=sampler,
            window=None if window is None else (window, window),
            inpaints=self._inpaints,
        )

    @property
    def _inpaints(self) -> bool:
        """Whether the network is told the mask and the picture, beside the noisy latent."""
        return self.model.unet.in_channels > self.model.unet.out_channels

    def save(self, path: str | Path, dtype: DTypeLike = np.float32) -> None:
        """Writes a folder that `load` and diffusers read.

        Raises:
            ValueError: when the folder holds anything that is not ours to replace, or cannot be written, or for a
                `dtype` other than float32, float16 and bfloat16.
        """
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise ValueError(f"dtype is {dtype!r}; choose float32, float16 or bfloat16.") from None
        write_folder(path, self.model, dtype)

    @property
    def _jax_dtype(self) -> DTypeLike:
        return jnp.dtype(self.dtype)

    def _latent_shape(
        self, ask: Settings, b: int, latents: np.ndarray | None, image: np.ndarray | None
    ) -> tuple[int, int, int]:
        """Height, width and channels of the latents, from the size, the image, the latents given, or the model."""
        factor, channels = self.model.vae.factor, self.model.vae.latent_channels
        if latents is not None and not np.isfinite(latents).all():
            raise ValueError("latents must be an array of finite numbers: images, height, width, channels.")
        size: Any = ask.size
        if image is not None:
            own = image.shape[2], image.shape[1]
            fits("The image", own, factor)
            drawn = own[0] * ask.enlarge, own[1] * ask.enlarge
            if size not in (None, drawn):
                how = " enlarged" if ask.enlarge > 1 else ""
                raise ValueError(f"size is {size[0]}x{size[1]}, but the image is {drawn[0]}x{drawn[1]}{how}; leave "
                                 "size out, or resize the image.")  # fmt: skip
            size = drawn
        if size is None:
            size = (
                self.size if latents is None or latents.ndim != 4 else tuple(factor * n for n in latents.shape[2:0:-1])
            )
        if size is None:
            raise ValueError("The model does not say at which size it was trained; give a size.")
        fits("size", size, factor)
        shape = (size[1] // factor, size[0] // factor, channels)
        if latents is not None and latents.shape != (b, *shape):
            raise ValueError(f"latents have the shape {latents.shape}; it must be {(b, *shape)}: "
                             "images, height, width, channels.")  # fmt: skip
        return shape


def _way_back(ask: Settings) -> str:
    """The sampler that goes from an inverted image's noise to the image."""
    sampler, _ = INVERSIONS[str(ask.invert)]
    if ask.sampler not in ("ddim", sampler):
        raise ValueError(f"invert {ask.invert!r} draws with the sampler {sampler}; leave out sampler {ask.sampler!r}.")
    if ask.eta:
        raise ValueError(f"eta is {ask.eta:g}, which adds noise that invert has not found; leave it at 0.")
    return sampler


def _is_run(path: Path) -> bool:
    """Whether `train.py` made the folder."""
    if (path / "export").is_dir() or (path / "checkpoints").is_dir():
        return True
    return (path / "config.json").is_file() and "task" in load_json(path / "config.json")


def _expected(name: str, config: NetworkConfig) -> Params:
    """The shapes of a network's params; finding them takes as long as tracing it, so they are kept as well."""

    def find() -> bytes:
        shapes = leaves(build.param_shapes(getattr(build, name)(config), config))
        return json.dumps({"/".join(path): leaf.shape for path, leaf in shapes}).encode()

    tree: Params = {}
    for path, shape in json.loads(remembered("shapes", (name, config), find)).items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct(shape, np.float32)
    return tree


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}.")


def on_device(params: Params, dtype: DTypeLike, device: Any = None) -> Params:
    """The params as pictures are drawn with them: in the networks' types, on the default device or a sharding's.

    On a CPU whose memory has room for them, kernels have their Winograd form beside them, more than twice their size
    (`jaxdiff.nn.conv.prepare`): no tree to save or train.
    """
    placed = jax.device_put(in_dtype(params, dtype), device)
    if jax.default_backend() != "cpu" or 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(placed)) > _memory():
        return placed
    return prepare(placed)


def in_dtype(params: Params, dtype: DTypeLike) -> Params:
    """The params as the networks would cast them at every step: norms in float32, all else in `dtype`."""
    kept = np.float32 if "scale" in params else dtype
    return {
        name: in_dtype(leaf, dtype) if isinstance(leaf, dict) else leaf.astype(kept, copy=False)
        for name, leaf in params.items()
    }


def _check_parts(model: Folder) -> None:
    taken, given, latent = model.unet.in_channels, model.unet.out_channels, model.vae.latent_channels
    if given != latent or taken not in (latent, 2 * latent + 1):  # the larger is an inpainting model's
        raise ValueError(f"The UNet takes {taken} channels and gives {given}, the VAE's latents have {latent}; "
                         "for text to image they must be equal.")  # fmt: skip
    wanted, width = model.unet.cross_attention_dim, model.text_encoder.hidden_size
    if wanted != width:
        raise ValueError(f"The UNet's cross_attention_dim is {wanted}, the text encoder's hidden_size {width}; "
                         "they must be equal.")  # fmt: skip


def _check_memory(model: Folder, b: int, shape: tuple[int, int, int], dtype: DTypeLike) -> None:
    """Refuses what a CPU's memory cannot hold by any means, for which the system kills the process without a word.

    Accelerators say themselves when theirs is short.
    """
    if jax.default_backend() != "cpu":
        return
    # The autoencoder's last level turns the features of the one before into its own: nothing else is as large.
    height, width = (model.vae.factor * side for side in shape[:2])
    channels = sum(model.vae.block_out_channels[:2])
    needed = b * height * width * channels * np.dtype(dtype).itemsize
    if needed > _memory():
        raise ValueError(f"{b} x {width}x{height} pixels need {needed / 1e9:.0f} GB at least, this machine has "
                         f"{_memory() / 1e9:.0f} GB; use a smaller size, or fewer prompts at once.")  # fmt: skip


def _memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
