"""A text-to-image model that can be called: loading, checking what a user asks for, saving."""

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import UInt8

from jaxdiff import build
from jaxdiff.config import load_json
from jaxdiff.data.tokens import Tokenizer
from jaxdiff.diffusion.guidance import Guidance
from jaxdiff.diffusion.schedule import make_schedule
from jaxdiff.generate import Program, keys_and_noise, outline, text_to_image
from jaxdiff.io.convert import leaves
from jaxdiff.io.folder import Folder, NetworkConfig, read_folder, write_folder
from jaxdiff.io.programs import enable_compilation_cache, kept, remembered
from jaxdiff.io.weights import check_params
from jaxdiff.nn.conv import prepare
from jaxdiff.sampling.samplers import SAMPLERS, check_sampler, count_steps, make_grid
from jaxdiff.sampling.walk import begin
from jaxdiff.types import Params

EMBEDDED = Path(__file__).parent / "assets" / "emoji"
DTYPES = ("float32", "bfloat16")
MAX_SIDE = 8192  # pixels; far beyond, XLA's own counters overflow and abort the process


def load(path: str | Path | None = None, dtype: str | None = None) -> "Pipeline":
    """Reads a text-to-image model; programs are kept for the next process (see `enable_compilation_cache`).

    Args:
        path: a diffusers folder, or a run directory of `train.py`; None is the model that comes with the package.
        dtype: what the networks compute in, "float32" or "bfloat16"; None is float32 on CPUs, else bfloat16.

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
    return Pipeline(model, dtype, name=path.resolve().name)


class Pipeline:
    """Prompts to pictures. `load` makes one; so does a `Folder` in memory."""

    def __init__(self, model: Folder, dtype: str | None = None, name: str = "") -> None:
        """Puts the params on the default device, in the type that they are computed in.

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
        self.params = on_device(host, self._jax_dtype)
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

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        seed: int = 0,
        steps: int = 30,
        guidance: SupportsFloat = 7.5,
        sampler: str = "ddim",
        grid: str = "model",
        eta: SupportsFloat = 0.0,
        size: tuple[int, int] | None = None,
        latents: ArrayLike | None = None,
        guidance_interval: tuple[SupportsFloat, SupportsFloat] | None = None,
        cache_interval: int = 1,
        progress: Callable[[int], object] | None = None,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Draws one picture for each prompt; image i depends on its prompt and `seed + i` alone.

        Args:
            prompts: at least one.
            negative_prompt: what to steer away from; one for all, or one each; None is "".
            seed: from 0 to 2^32 - 1, as is every `seed + i`.
            steps: how many times the model is asked.
            guidance: how hard to follow the prompt (Ho & Salimans 2022); 1 is the model's own answer to the prompt.
            sampler: one of `jaxdiff.sampling.samplers.SAMPLERS`.
            grid: one of `jaxdiff.sampling.grids.GRIDS`, the noise levels to visit; "model" is the model's own spacing.
            eta: 0 takes all noise from the start, 1 adds fresh noise at every step (Song et al. 2021, eq. 16); for
                "tcd", how far each step goes below its level and back (its gamma).
            size: (width, height) in pixels; None is the model's own.
            latents: unit normal [b, h, w, c] in place of the seeds' starting noise.
            guidance_interval: the lowest and highest noise level (sigma) that are guided; None guides all. At the
                others the model is asked for the prompt alone, in half the time (Kynkäänniemi et al. 2024).
            cache_interval: 3 computes the network's deep features at every third step only and is faster, but draws
                another picture (Ma et al. 2023, DeepCache); 1 is exact.
            progress: is told the number of steps done, about ten times.

        Raises:
            ValueError: in one sentence, for values out of range or of the wrong kind.
        """
        prompts = _texts(prompts)
        b = len(prompts)
        if not b:
            raise ValueError("No prompt was given; give at least one.")
        negatives = [negative_prompt or ""] * b if isinstance(negative_prompt, str | None) else _texts(negative_prompt)
        if len(negatives) != b:
            raise ValueError(f"There are {len(negatives)} negative prompts for {b} prompts; give one, or one each.")
        seed, steps = _whole("seed", seed), _whole("steps", steps)
        if not 0 <= seed <= 2**32 - b:
            raise ValueError(f"seed is {seed}; it must lie from 0 to {2**32 - b} for {b} images.")
        scale, share = _float32(guidance), _float32(eta)
        guided = _float32([0, np.inf] if guidance_interval is None else guidance_interval)
        every = _whole("cache_interval", cache_interval)
        if scale.shape or not np.isfinite(scale):
            raise ValueError(f"guidance is {guidance!r}; it must be a finite number.")
        if share.shape or not 0 <= share <= 1:
            raise ValueError(f"eta is {eta!r}; it must lie from 0 to 1.")
        if guided.shape != (2,) or not 0 <= guided[0] <= guided[1]:
            raise ValueError(f"guidance_interval is {guidance_interval!r}; it must be two noise levels (sigma), 0 or "
                             "more, the lower one first.")  # fmt: skip
        if every < 1:
            raise ValueError(f"cache_interval is {every}; it must be at least 1.")
        if every > 1 and sampler in ("lcm", "tcd"):
            raise ValueError(f"cache_interval is {every}, which the sampler {sampler} cannot use: its few steps are "
                             "far apart. Leave it at 1.")  # fmt: skip
        check_sampler(sampler, grid, float(share))

        model = self.model
        levels = make_grid(sampler, grid, model.scheduler, make_schedule(model.scheduler), steps, float(share))
        asked, steps = steps, count_steps(levels)
        given = None if latents is None else _float32(latents)
        shape = self._latent_shape(size, b, given)
        _check_memory(model, b, shape, self._jax_dtype)
        keys, x = _keys_and_noise(np.arange(seed, seed + b, dtype=np.uint32), shape)
        if given is not None:
            x = jnp.asarray(given)
        tokens = np.stack([self.tokenizer(negatives), self.tokenizer(prompts)], axis=1)
        program = Program(
            text_encoder=build.text_encoder(model.text_encoder, self._jax_dtype),
            unet=build.unet(model.unet, self._jax_dtype),
            vae=build.vae(model.vae, self._jax_dtype),
            scheduler=model.scheduler,
            scaling_factor=model.vae.scaling_factor,
            sampler=sampler,
            interval=guidance_interval is not None,
            reuse=every > 1,
        )
        state = _begin(x)
        turned = Guidance(*map(jnp.asarray, (scale, *guided))), share, np.int32(min(every, steps))
        # A bar needs the program to return now and then; the pieces are the same program and give the same picture.
        piece = steps if progress is None else every * math.ceil(steps / 10 / every)
        ends = np.int32(0), np.int32(0), np.int32(steps)
        arguments = self.params, tokens, state, keys, levels, *ends, *turned
        ours = SAMPLERS[sampler].fn.__module__.startswith("jaxdiff.")  # of others, the source is not known
        draw = (
            kept(text_to_image, outline, *arguments, program=program)
            if ours
            else partial(text_to_image, program=program)
        )
        for start in range(0, steps, piece):
            stop = min(start + piece, steps)
            ends = np.int32(start), np.int32(stop), np.int32(steps)
            state, images = draw(self.params, tokens, state, keys, levels, *ends, *turned)
            if progress is not None:
                state.x.block_until_ready()
                progress(min(stop, asked))
        if not np.isfinite(state.x).all():
            raise ValueError(f"The picture came to nothing: with guidance {scale:g}, {self.dtype} overflowed. Use less "
                             "guidance, or another sampler or grid.")  # fmt: skip
        return np.asarray(images)

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

    def _latent_shape(self, size: Any, b: int, latents: np.ndarray | None) -> tuple[int, int, int]:
        """Height, width and channels of the latents, from the size, the latents given, or the model."""
        factor, channels = self.model.vae.factor, self.model.vae.latent_channels
        if latents is not None and not np.isfinite(latents).all():
            raise ValueError("latents must be an array of finite numbers: images, height, width, channels.")
        if size is None:
            size = self.size if latents is None or latents.ndim != 4 else [factor * n for n in latents.shape[2:0:-1]]
        if size is None:
            raise ValueError("The model does not say at which size it was trained; give a size.")
        sides = list(size) if isinstance(size, Iterable) else []
        if isinstance(size, str) or len(sides) != 2:
            raise ValueError(f"size is {size!r}; it must be (width, height), in pixels.")
        width, height = (_whole("size", side) for side in sides)
        if min(width, height) < factor or width % factor or height % factor:
            raise ValueError(f"size is {width}x{height}; both sides must be multiples of {factor}, the VAE's factor.")
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"size is {width}x{height}; a side may have {MAX_SIDE} pixels at most.")
        shape = (height // factor, width // factor, channels)
        if latents is not None and latents.shape != (b, *shape):
            raise ValueError(f"latents have the shape {latents.shape}; it must be {(b, *shape)}: "
                             "images, height, width, channels.")  # fmt: skip
        return shape


# Drawn by its own small program, so that given latents and seeds share the large one.
_keys_and_noise = jax.jit(keys_and_noise, static_argnums=1)
_begin = jax.jit(jax.vmap(begin))


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


def on_device(params: Params, dtype: DTypeLike) -> Params:
    """The params as pictures are drawn with them: in the networks' types, on the default device.

    On a CPU whose memory has room for them, kernels have their Winograd form beside them, more than twice their size
    (`jaxdiff.nn.conv.prepare`): no tree to save or train.
    """
    placed = jax.device_put(_in_dtype(params, dtype))
    if jax.default_backend() != "cpu" or 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(placed)) > _memory():
        return placed
    return prepare(placed)


def _in_dtype(params: Params, dtype: DTypeLike) -> Params:
    """The params as the networks would cast them at every step: norms in float32, all else in `dtype`."""
    kept = np.float32 if "scale" in params else dtype
    return {
        name: _in_dtype(leaf, dtype) if isinstance(leaf, dict) else leaf.astype(kept, copy=False)
        for name, leaf in params.items()
    }


def _check_parts(model: Folder) -> None:
    taken, given, latent = model.unet.in_channels, model.unet.out_channels, model.vae.latent_channels
    if not taken == given == latent:
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


def _whole(name: str, value: Any) -> int:
    message = f"{name} is {value!r}; it must be a whole number."
    if isinstance(value, bool):
        raise ValueError(message)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(message) from None


def _texts(given: Any) -> list[str]:
    texts: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"A prompt is {text!r}; it must be text.")
    return texts


def _float32(value: Any) -> np.ndarray:
    """Real numbers of any type as float32; NaN for whatever else it is, infinity for what float32 does not hold."""
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return np.array(np.nan, np.float32)
    if not np.can_cast(array.dtype, np.float64):
        return np.array(np.nan, np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
