"""Every setting, as frozen dataclasses that refuse nonsense when they are made.

The network and scheduler classes carry the field names of the diffusers and transformers `config.json` files, so that a
folder's file and a dataclass are one thing. Nothing here imports more than the standard library.
"""

import dataclasses
import difflib
import json
import sys
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(where: str, value: Any, allowed: tuple[Any, ...]) -> None:
    _require(value in allowed, f"{where} is {value!r}; supported: {', '.join(map(repr, allowed))}.")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        _require(all(v > 0 for v in numbers), f"{type(config).__name__}.{name} is {value}; it must be above 0.")


@dataclass(frozen=True)
class _Checked:
    """Takes each value as its field's type wants it, lists as tuples, or refuses it; then asks `_check`."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = _coerce(hints[f.name], getattr(self, f.name), f"{type(self).__name__}.{f.name}")
            object.__setattr__(self, f.name, value)
        self._check()

    def _check(self) -> None:
        """What no single field's type can say; raises ValueError."""


# ------------------------------------------------------------------------------------------------ networks

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class UNetConfig(_Checked):
    """`unet/config.json`. `attention_head_dim` is the *number* of heads per level, as diffusers reads it."""

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    only_cross_attention: bool | tuple[bool, ...] = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    act_fn: Literal["silu"] = "silu"

    def _check(self) -> None:
        n = len(self.block_out_channels)
        _require(n > 0, "UNetConfig.block_out_channels is empty; give the channels of each level.")
        _positive(
            self,
            "sample_size",
            "in_channels",
            "out_channels",
            "block_out_channels",
            "layers_per_block",
            "transformer_layers_per_block",
            "attention_head_dim",
            "num_attention_heads",
            "cross_attention_dim",
            "norm_num_groups",
            "norm_eps",
        )
        for name in ("down_block_types", "up_block_types"):
            _require(
                len(getattr(self, name)) == n,
                f"UNetConfig.{name} names {len(getattr(self, name))} blocks, "
                f"block_out_channels has {n} levels; they must be as many.",
            )
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"):
            value = getattr(self, name)
            _require(
                not isinstance(value, tuple) or len(value) == n,
                f"UNetConfig.{name} is {value}; give one number, or one for each of the {n} levels.",
            )
        for block in self.down_block_types:
            _one_of("UNetConfig.down_block_types", block, DOWN_BLOCKS)
        for block in self.up_block_types:
            _one_of("UNetConfig.up_block_types", block, UP_BLOCKS)
        _one_of("UNetConfig.mid_block_type", self.mid_block_type, ("UNetMidBlock2DCrossAttn",))
        _one_of("UNetConfig.downsample_padding", self.downsample_padding, (1,))
        _one_of("UNetConfig.only_cross_attention", self.only_cross_attention, (False,))
        half = self.block_out_channels[0] // 2
        _require(
            self.freq_shift < half,
            f"UNetConfig.freq_shift is {self.freq_shift}; it must be below {half}, half of the first level's channels.",
        )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            _require(
                channels % self.norm_num_groups == 0,
                f"UNetConfig.block_out_channels has {channels}, which "
                f"norm_num_groups {self.norm_num_groups} does not divide.",
            )
            _require(
                channels % heads == 0,
                f"UNetConfig.block_out_channels has {channels}, which {heads} heads "
                "(attention_head_dim) do not divide.",
            )

    def per_level(self, name: str) -> tuple[Any, ...]:
        """The value of a field for each level, where one number stands for all."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return self.per_level("num_attention_heads" if self.num_attention_heads is not None else "attention_head_dim")


@dataclass(frozen=True)
class VAEConfig(_Checked):
    """`vae/config.json`: AutoencoderKL, a factor of 2 for each level after the first."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    act_fn: Literal["silu"] = "silu"

    def _check(self) -> None:
        n = len(self.block_out_channels)
        _require(n > 0, "VAEConfig.block_out_channels is empty; give the channels of each level.")
        _positive(
            self,
            "sample_size",
            "in_channels",
            "out_channels",
            "latent_channels",
            "block_out_channels",
            "layers_per_block",
            "norm_num_groups",
            "scaling_factor",
        )
        for name, allowed in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            _require(
                len(getattr(self, name)) == n,
                f"VAEConfig.{name} names {len(getattr(self, name))} blocks, "
                f"block_out_channels has {n} levels; they must be as many.",
            )
            for block in getattr(self, name):
                _one_of(f"VAEConfig.{name}", block, (allowed,))
        for channels in self.block_out_channels:
            _require(
                channels % self.norm_num_groups == 0,
                f"VAEConfig.block_out_channels has {channels}, which "
                f"norm_num_groups {self.norm_num_groups} does not divide.",
            )

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class CLIPTextConfig(_Checked):
    """`text_encoder/config.json`."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    def _check(self) -> None:
        _positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "layer_norm_eps",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPTextConfig.hidden_size {self.hidden_size} is "
            f"not a multiple of num_attention_heads {self.num_attention_heads}.",
        )


@dataclass(frozen=True)
class SchedulerConfig(_Checked):
    """`scheduler/scheduler_config.json`: the noise schedule and how to walk it."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    def _check(self) -> None:
        _positive(self, "num_train_timesteps", "clip_sample_range")
        _require(
            0 < self.beta_start <= self.beta_end < 1,
            f"SchedulerConfig.beta_start {self.beta_start} and beta_end "
            f"{self.beta_end} must satisfy 0 < beta_start <= beta_end < 1.",
        )
        _require(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"SchedulerConfig.steps_offset is {self.steps_offset}; it must lie in [0, {self.num_train_timesteps}).",
        )
        _require(
            not self.rescale_betas_zero_snr or self.num_train_timesteps > 1,
            "SchedulerConfig.rescale_betas_zero_snr needs num_train_timesteps above 1: one step would be all noise.",
        )


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class DataConfig(_Checked):
    """What is read, and what is done to each picture on the way."""

    source: str = "emoji"
    """`emoji` (made by `python -m jaxdiff.tools.prepare emoji`), `folder`, `latents`, or any TFDS data set's name."""
    root: str = "data"
    """The TFDS data directory, the folder of pictures, or the latents file."""
    split: str = "train"
    heldout: str = "heldout"
    """TFDS only: the split that reconstructions are measured on; empty measures on `split`."""
    image_field: str = "image"
    """TFDS only: the feature that holds the picture."""
    text_field: str = "caption"
    """TFDS only: the feature that holds the caption, or a class label (its name becomes the caption)."""
    size: int = 64
    """Pixels along each side of the square crop."""
    batch_size: int = 64
    """Global batch: pictures an optimiser step, over all hosts."""
    crop: float = 1.0
    """Smallest share of the shorter side that a random square crop may take; 1 crops nothing but to a square."""
    flip: bool = False
    """Mirror left and right half of the time."""
    workers: int = 0
    """grain worker processes; 0 reads in the trainer's own threads."""
    max_bad_share: float = 0.01
    """Records that cannot be read are skipped and counted; a larger share than this stops the run."""

    def _check(self) -> None:
        _positive(self, "size", "batch_size")
        _require(0 < self.crop <= 1, f"DataConfig.crop is {self.crop}; it must lie in (0, 1].")
        _require(self.workers >= 0, f"DataConfig.workers is {self.workers}; it must not be negative.")
        _require(
            0 <= self.max_bad_share < 1, f"DataConfig.max_bad_share is {self.max_bad_share}; it must lie in [0, 1)."
        )


@dataclass(frozen=True)
class OptimConfig(_Checked):
    """AdamW with linear warm-up, cosine decay to `lr * final_lr_share`, and clipping by global norm."""

    lr: float = 1e-4
    warmup_steps: int = 500
    final_lr_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def _check(self) -> None:
        _positive(self, "lr", "eps", "clip_norm")
        _require(self.warmup_steps >= 0, f"OptimConfig.warmup_steps is {self.warmup_steps}; it must not be negative.")
        for name in ("b1", "b2", "final_lr_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"OptimConfig.{name} is {value}; it must lie in [0, 1].")


@dataclass(frozen=True)
class MeshConfig(_Checked):
    """Devices along each mesh axis; `data` -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def _check(self) -> None:
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            _require(
                value > 0 or (value == -1 and name == "data"),
                f"MeshConfig.{name} is {value}; it must be above 0{' or -1' if name == 'data' else ''}.",
            )


@dataclass(frozen=True)
class VAETask(_Checked):
    """Trains the autoencoder: an L1 + L2 reconstruction and a small KL term (Rombach et al. 2022, section 3.1)."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-6
    l1_weight: float = 1.0
    """Share of the absolute error beside the squared one; 0 is best for PSNR, more for sharp edges."""
    init: str = ""
    """Folder or run directory whose VAE is the start; empty starts from random weights."""
    train_encoder: bool = True
    """False trains the decoder alone: latents, and all that was trained on them, stay as they are."""

    def _check(self) -> None:
        for name in ("kl_weight", "l1_weight"):
            _require(getattr(self, name) >= 0, f"VAETask.{name} is {getattr(self, name)}; it must not be negative.")
        _require(
            self.train_encoder or bool(self.init),
            "VAETask.train_encoder is False and init is empty: an encoder of "
            "random weights would stay so. Name a folder in init, or train it.",
        )


@dataclass(frozen=True)
class DiffusionTask(_Checked):
    """Trains the UNet, and the text encoder if wanted, on the latents of a frozen VAE."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    vae: str = ""
    """Folder or run directory that holds the trained VAE (and, for a folder, the weights to start from: see `init`)."""
    tokenizer: str = ""
    """Folder with `vocab.json` and `merges.txt` or `tokenizer.json`."""
    init: str = ""
    """Folder or run directory whose UNet and text encoder are the start; empty starts from random weights."""
    train_text_encoder: bool = True
    caption_dropout: float = 0.1
    """Share of captions emptied, so that the model learns the unconditional half of guidance (Ho & Salimans 2022)."""
    min_snr_gamma: float | None = None
    """Cap on the loss's signal-to-noise weight (Hang et al. 2023); None weighs all noise levels alike."""
    latent_variants: int = 0
    """Latents encoded once for so many augmentations of each picture, before training; 0 encodes at every step."""
    prompts: tuple[str, ...] = ()
    """Drawn at every evaluation, with seeds 0, 1, ...; empty draws captions of the training data."""

    def _check(self) -> None:
        _require(
            self.unet.cross_attention_dim == self.text_encoder.hidden_size,
            f"UNetConfig.cross_attention_dim is {self.unet.cross_attention_dim} and CLIPTextConfig.hidden_size "
            f"{self.text_encoder.hidden_size}; they must be equal.",
        )
        _require(
            self.train_text_encoder or bool(self.init),
            "DiffusionTask.train_text_encoder is False and init is empty: "
            "a text encoder of random weights would stay so. Name a folder in init, or train it.",
        )
        _require(
            0 <= self.caption_dropout <= 1,
            f"DiffusionTask.caption_dropout is {self.caption_dropout}; it must lie in [0, 1].",
        )
        _require(
            self.min_snr_gamma is None or self.min_snr_gamma > 0,
            f"DiffusionTask.min_snr_gamma is {self.min_snr_gamma}; it must be above 0, or None.",
        )
        _require(
            self.latent_variants >= 0,
            f"DiffusionTask.latent_variants is {self.latent_variants}; it must not be negative.",
        )


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """One run. `configs/*.py` make these; the resolved one is written beside the checkpoints."""

    workdir: str
    task: VAETask | DiffusionTask
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 10_000
    seed: int = 0
    ema_decay: float = 0.999
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; parameters, optimiser and EMA stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    tensorboard: bool = False

    def _check(self) -> None:
        _positive(self, "steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        _require(0 <= self.ema_decay < 1, f"TrainConfig.ema_decay is {self.ema_decay}; it must lie in [0, 1).")


# ------------------------------------------------------------------------------------------------ to and from JSON


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts and lists, ready for JSON; `from_dict` reads them back. A union's member is named by `kind`."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            kind = (
                {"kind": type(value).__name__} if len(_classes(typing.get_type_hints(type(config))[f.name])) > 1 else {}
            )
            value = kind | to_dict(value)
        out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Builds `cls` from JSON values, checking names and types.

    Raises:
        ValueError: naming `where`, the field and its value; an unknown field is told its nearest right name.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in names:
            raise ValueError(f"{where}: {cls.__name__} has no field {name!r}{nearest(name, names)}")
    try:
        return cls(**{name: _coerce(hints[name], value, f"{where}: {name}") for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {cls.__name__} cannot be made: {error}.") from error


def nearest(name: str, names: list[str] | tuple[str, ...]) -> str:
    """The end of an error sentence: the likeliest right name, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(names))}."


def load_json(path: Any) -> dict[str, Any]:
    """A JSON file that holds an object; anything else is a ValueError that names the file."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object.")
    return values


def _classes(hint: Any) -> list[type]:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [m for m in members if dataclasses.is_dataclass(m)]  # pyright: ignore[reportReturnType]


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` wants it (lists become tuples, dicts dataclasses), or a ValueError."""
    if classes := _classes(hint):
        kinds = {c.__name__: c for c in classes}
        if isinstance(value, tuple(classes)):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it must hold the fields of {' or '.join(kinds)}.")
        value = dict(value)
        cls = classes[0]
        if len(classes) > 1:
            kind = value.pop("kind", None)
            _one_of(f"{where}.kind", kind, tuple(kinds))
            cls = kinds[kind]
        return from_dict(cls, value, where)
    taken: Any = tuple(value) if isinstance(value, list) else value
    if not _fits(hint, taken):
        if typing.get_origin(hint) is Literal:
            _one_of(where, value, typing.get_args(hint))
        raise ValueError(f"{where} is {value!r}; it must be {_words(hint)}.")
    return float(taken) if hint is float else taken


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(args[0], v) for v in value)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # neither infinite nor NaN
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    types.NoneType: ("None", "None"),
}


def _words(hint: Any) -> str:
    """What `hint` takes, for an error sentence."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_words, args))
    return f"a list of {_WORDS[args[0]][1]}" if origin is tuple else _WORDS[hint][0]
