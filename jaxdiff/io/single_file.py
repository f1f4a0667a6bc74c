"""Models in one file, in the original layout of Stable Diffusion 1 and 2: `.safetensors`, and `.ckpt` of torch.save.

Such a file holds tensors by their names in the original code and nothing else. Its networks' sizes are found from the
names and shapes. What these do not say (`_UNSAID`) is what the two known layouts have; a file that was written here
says in its metadata where it differs.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxdiff.config import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig, from_dict, to_dict
from jaxdiff.io import ldm
from jaxdiff.io.convert import from_torch, torch_views
from jaxdiff.io.torch_files import open_torch
from jaxdiff.io.weights import Stored, listed, open_safetensors, read_metadata, stored, write_safetensors
from jaxdiff.types import Params

NetworkConfig = UNetConfig | VAEConfig | CLIPTextConfig
Shapes = Mapping[str, tuple[int, ...]]
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
logger = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where a network's tensors are in a file."""

    network: str
    prefix: str
    anchor: str
    """A tensor that tells, after the prefix, that the network is there."""
    openclip: bool = False


_PLACES = (
    _Place("unet", "model.diffusion_model.", "input_blocks.0.0.weight"),
    _Place("unet", "", "input_blocks.0.0.weight"),
    _Place("vae", "first_stage_model.", "decoder.mid.block_1.norm1.weight"),
    _Place("vae", "vae.", "decoder.mid.block_1.norm1.weight"),
    _Place("vae", "", "decoder.mid.block_1.norm1.weight"),
    _Place("text_encoder", "cond_stage_model.transformer.", "text_model.embeddings.token_embedding.weight"),
    _Place("text_encoder", "cond_stage_model.transformer.", "embeddings.token_embedding.weight"),  # as some merges do
    _Place("text_encoder", "cond_stage_model.model.", "token_embedding.weight", openclip=True),
)
NETWORKS = ("unet", "vae", "text_encoder")

# What a file seems to be that is not read, by names that it has; the first that is found.
_OTHERS = (
    (r"conditioner\.embedders\.[01]\.(transformer|model)\.", "an SDXL model, and SDXL is not supported yet"),
    (r"(^|\.)(lora_|lora\.|hada_w1|lokr_w1|lora_[AB]\.)|\.(hada_|lokr_|lora_)|dora_scale$",
     "a LoRA or one of its kin, which are not supported yet"),
    (r"^(control_model|input_hint_block|zero_convs|controlnet_)", "a ControlNet, which are not supported yet"),
    (r"(^|\.)double_blocks\.", "a Flux model, and Flux is not supported yet"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model, and that is not supported yet"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter, which are not supported yet"),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter, which are not supported yet"),
    (r"^(emb_params|clip_l|clip_g|string_to_param.*)$", "a textual inversion, which are not supported yet"),
    (r"^(model\.diffusion_model\.)?label_emb\.",
     "a denoiser with labels or vectors beside its prompts (SDXL, unCLIP or an upscaler), which are not supported yet"),
    (r"^(down_blocks|encoder\.down_blocks|text_model|encoder\.layers|embeddings)\.",
     "a network of a diffusers folder; name the folder that it belongs to"),
    (r"^(vision_model|visual)\.", "an image encoder, which are not supported yet"),
    (r"^(encoder\.block|shared\.weight)", "a T5 text encoder, which are not supported yet"),
)  # fmt: skip
_EMA = "model_ema."

# What is no network's and says nothing about what is drawn: buffers of the noise schedule, counters, weights of losses,
# tensors of CLIP that a text encoder has no use for, and other averages of the same weights.
_IGNORED = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|lvlb_weights|logvar|scale_factor"
    r"|denoiser\.sigmas|global_step|model_ema\..*|(first_stage_model\.|vae\.)?(loss|model_ema)\..*"
    r"|.*\.position_ids|cond_stage_model\..*\.(logit_scale|attn_mask|text_projection(\.weight)?))"
)


class _Layout(NamedTuple):
    """What a published layout has where shapes do not say it."""

    name: str
    head_channels: int | None
    """Channels of a head of the denoiser's attention; None is 8 heads at every level."""
    activation: str
    pad_id: int | None
    """The token that fills up prompts; None is the end token."""


_SD1 = _Layout("Stable Diffusion 1", None, "quick_gelu", None)
_HEADS = 8
_HEAD_CHANNELS = 64  # of CLIP's text towers, too
_SD2 = _Layout("Stable Diffusion 2", _HEAD_CHANNELS, "gelu", 0)
_OPENCLIP_LAYERS = 24
_SCHEDULER = SchedulerConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
# Fields that shapes do not say; of a file that was written here its metadata do, where they differ from the layout's.
_UNSAID = {
    "unet": ("sample_size", "attention_head_dim", "norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift"),
    "vae": ("sample_size", "norm_num_groups", "scaling_factor"),
    "text_encoder": ("num_attention_heads", "hidden_act", "layer_norm_eps", "projection_dim", "bos_token_id",
                     "eos_token_id", "pad_token_id"),
    "scheduler": tuple(field.name for field in fields(SchedulerConfig)),
}  # fmt: skip
_SAID = "jaxdiff"
_MARK = {"format": "pt", "written_by": "jaxdiff"}


@dataclass(frozen=True)
class SingleFile:
    """A file's tensors, mapped, and what is found in them. Made by `open_single`."""

    path: Path
    tensors: Mapping[str, np.ndarray]
    """By the file's own names."""
    metadata: Mapping[str, str]
    prediction_type: str | None = None
    """What the denoiser predicts, where the user says it."""
    ema: bool = False
    """Takes the denoiser's averaged weights in place of the last ones; other networks have none."""

    @cached_property
    def places(self) -> dict[str, _Place]:
        """Where each network is that the file has."""
        found = {}
        for place in _PLACES:
            if place.prefix + place.anchor in self.tensors:
                found.setdefault(place.network, place)
        return found

    @cached_property
    def layout(self) -> _Layout:
        """The layout that the file seems to have: it is told by the denoiser's projections, or the text tower."""
        if "unet" in self.places:
            prefix = self.places["unet"].prefix
            flat = [
                a.ndim == 2 for n, a in self.tensors.items() if n.startswith(prefix) and n.endswith("proj_in.weight")
            ]
            return _SD2 if flat and flat[0] else _SD1
        return _SD2 if "text_encoder" in self.places and self.places["text_encoder"].openclip else _SD1

    @cached_property
    def said(self) -> dict[str, Any]:
        """What the metadata say of the configs, of a file that was written here."""
        try:
            said = json.loads(self.metadata.get(_SAID, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged: {_SAID!r} of its metadata is not JSON.") from error
        if not isinstance(said, dict) or not all(
            isinstance(said.get(part, {}), dict) for part in (*_UNSAID, "defaults")
        ):
            raise ValueError(f"{self.path} is damaged: {_SAID!r} of its metadata is no object of objects.")
        return said

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that the model is sampled with where a user gives none, of a file that was written here."""
        return self.said.get("defaults", {})

    @property
    def pad_id(self) -> int | None:
        """The token that fills up prompts; None is the end token."""
        pad = self.said.get("pad_id", self.layout.pad_id)
        if pad is not None and not (type(pad) is int and 0 <= pad < 2**31):
            raise ValueError(f"{self.path} is damaged: pad_id of its metadata is {pad!r}, not a token's number.")
        return pad

    def network(self, name: str) -> tuple[Any, Params]:
        """The config and the params of "unet", "vae" or "text_encoder", in the type that they are stored in.

        Raises:
            ValueError: where the file lacks the network, the averages, or a tensor that its sizes are found from.
        """
        config, found = self.config(name), self._found(name)
        average = self.ema and name == "unet"
        try:
            return config, from_torch(
                (ours, self._average(original) if average else array) for ours, (original, array) in found.items()
            )
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def config(self, name: str) -> Any:
        """The config of "unet", "vae" or "text_encoder".

        Raises:
            ValueError: as `network`.
        """
        values = self._values(name) | {key: v for key, v in self.said.get(name, {}).items() if key in _UNSAID[name]}
        if name == "unet" and isinstance(heads := values["attention_head_dim"], list | tuple):
            values["attention_head_dim"] = _one(tuple(heads))
        heads = values["num_attention_heads"] if name == "text_encoder" else values.get("attention_head_dim")
        if 0 in (heads if isinstance(heads, tuple) else (heads,)):
            raise ValueError(
                f"{self.path} does not say how many heads its {name} has; in {self.layout.name} they have "
                f"{_HEAD_CHANNELS} channels each, of which its widths are no multiples."
            )
        return self._made(_CLASSES[name], values)

    def _values(self, name: str) -> dict[str, Any]:
        """The values of a network's config, by its shapes and the layout."""
        try:
            values = _VALUES[name]({ours: array.shape for ours, (_, array) in self._found(name).items()}, self.layout)
        except _NotThere as missing:
            raise ValueError(
                f"{self.path}: the {name} is not whole: {missing} is missing, or of no shape that a {name} has. "
                "Download or save it again."
            ) from missing
        if name == "unet":
            values["sample_size"] = self._side
        elif name == "vae":
            values["sample_size"] = self._side * 2 ** (len(values["block_out_channels"]) - 1)
        return values

    @cached_property
    def scheduler(self) -> SchedulerConfig:
        """The noise schedule; a prediction type that is neither given nor in the file is guessed, with a warning."""
        found, guessed = self._prediction
        if guessed:
            logger.warning(
                "%s: a file of %s does not say what its denoiser predicts; taken as %s. If images are noise, give "
                "prediction_type (--prediction-type) as %s.",
                self.path, self.layout.name, found, "epsilon" if found == "v_prediction" else "v_prediction",
            )  # fmt: skip
        values = to_dict(_SCHEDULER) | self.said.get("scheduler", {}) | {"prediction_type": found}
        return self._made(SchedulerConfig, values)

    def _made(self, cls: type, values: Mapping[str, Any]) -> Any:
        try:
            return from_dict(cls, dict(values), cls.__name__)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    @cached_property
    def _prediction(self) -> tuple[str, bool]:
        """What the denoiser predicts, and whether that is a guess: of SD2 there are models of both kinds."""
        told = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
        if self.prediction_type is not None:
            return self.prediction_type, False
        if "prediction_type" in (said := self.said.get("scheduler", {})):
            return str(said["prediction_type"]), False
        if (word := self.metadata.get("modelspec.prediction_type")) in told:  # by the standard of Stability AI
            return told[word], False
        if self.layout is _SD1:
            return "epsilon", False
        inpaints = "unet" in self.places and self.tensors[self._anchor("unet")].shape[1:2] == (9,)
        return ("epsilon" if inpaints else "v_prediction"), True

    @property
    def _side(self) -> int:
        """Latent pixels along each side that the published model of the layout was trained at."""
        return 96 if self.layout is _SD2 and self._prediction[0] == "v_prediction" else 64

    @cached_property
    def spare(self) -> dict[str, np.ndarray]:
        """The tensors that are no part of the networks, by the file's own names.

        With `ema` these are neither the plain weights nor the averages, which have taken their place.
        """
        used = {original for name in self.places for original, _ in self._found(name).values()}
        if self.ema and "unet" in self.places:
            used |= {self._flat(original) for original, _ in self._found("unet").values()}
        return {name: array for name, array in self.tensors.items() if name not in used}

    @cached_property
    def unknown(self) -> list[str]:
        """Names of tensors that are neither a network's nor known to be of no use."""
        blocks = ()
        if "text_encoder" in self.places and self.places["text_encoder"].openclip:
            prefix = self.places["text_encoder"].prefix
            names = [name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)]
            blocks = tuple(
                f"{prefix}transformer.resblocks.{i}." for i in range(_used_layers(names), ldm.openclip_layers(names))
            )
        return [name for name in self.spare if not _IGNORED.fullmatch(name) and not name.startswith(blocks or "\0")]

    def warn_of_unknown(self) -> None:
        """Says in a warning which tensors are left out that nobody here knows."""
        if self.unknown:
            logger.warning(
                "%s: %d tensors are left out, which are of no known use: %s.",
                self.path, len(self.unknown), listed(self.unknown),
            )  # fmt: skip

    def _anchor(self, name: str) -> str:
        return self.places[name].prefix + self.places[name].anchor

    def _found(self, name: str) -> dict[str, tuple[str, np.ndarray]]:
        """A network's tensors by diffusers' names, each with the file's own name."""
        if name not in self._networks:
            if name not in self.places:
                wanted = next(place for place in _PLACES if place.network == name)
                raise ValueError(
                    f"{self.path} has no {name}: {wanted.prefix}{wanted.anchor} is missing. It seems to be "
                    f"{self.seems}."
                )
            place = self.places[name]
            inside = {n.removeprefix(place.prefix): a for n, a in self.tensors.items() if n.startswith(place.prefix)}
            if name == "unet":
                table = ldm.unet_table(*ldm.unet_sizes(inside))
            elif name == "vae":
                table = ldm.vae_table(*ldm.vae_sizes(inside))
            elif place.openclip:
                table = ldm.openclip_table(_used_layers(inside))
            else:
                head = "text_model." if place.anchor.startswith("text_model.") else ""
                table = {f"text_model.{part}": f"{head}{part}" for part in _CLIP_PARTS}
                inside = {n: a for n, a in inside.items() if not n.endswith(".position_ids")}
            found = ldm.from_ldm(inside, table)
            self._networks[name] = {n: (place.prefix + original, a) for n, (original, a) in found.items()}
        return self._networks[name]

    @cached_property
    def _networks(self) -> dict[str, dict[str, tuple[str, np.ndarray]]]:
        return {}

    @property
    def seems(self) -> str:
        """What the file seems to be, in words."""
        if self.places:
            return " and ".join(f"a {name}" for name in self.places) + " alone"
        return _seems(self.tensors) or f"none that is known, with tensors such as {listed(sorted(self.tensors)[:3])}"

    def _flat(self, original: str) -> str:
        """The name of a weight's average: LDM leaves out `model.` and all dots."""
        name = original.removeprefix(self.places["unet"].prefix)
        return f"{_EMA}diffusion_model{name.replace('.', '')}"

    def _average(self, original: str) -> np.ndarray:
        if (array := self.tensors.get(self._flat(original))) is None:
            raise ValueError(
                f"{self.path} has no averaged (EMA) weights: {self._flat(original)} is missing; load it without ema."
            )
        return array


class _NotThere(Exception):
    """The name of a tensor that a config is found from."""


_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_CLIP_PARTS = ("embeddings", "encoder", "final_layer_norm")


def is_single(path: Path | str) -> bool:
    """Whether `path` is meant as a model in one file: it is one, or is called like one and is no folder."""
    path = Path(path)
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


def open_single(path: Path | str, prediction_type: str | None = None, ema: bool = False) -> SingleFile:
    """Opens a file with a network or more, in the original layout.

    Raises:
        ValueError: where it is missing, damaged, or something else, saying what it seems to be; for a prediction type
            that there is not.
    """
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTIONS)}.")
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if head == b"PK\x03\x04" or head[:2] in _PICKLES:
        file = SingleFile(path, open_torch(path), {}, prediction_type, ema)
    else:
        file = SingleFile(path, open_safetensors(path), read_metadata(path), prediction_type, ema)
    if other := _seems(file.tensors):
        raise ValueError(f"{path} seems to be {other}.")
    if not file.places:
        raise ValueError(
            f"{path} holds no Stable Diffusion in its original layout; it seems to be {file.seems}. Models are read "
            "from such files and from diffusers folders."
        )
    return file


def write_single(
    path: Path | str,
    networks: Mapping[str, tuple[NetworkConfig, Params]],
    scheduler: SchedulerConfig | None = None,
    pad_id: int | None = None,
    spare: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Writes a safetensors file in the original layout, whole or not at all.

    What the layout does not say and other programs would take otherwise stands in the metadata, which `open_single`
    reads.

    Args:
        path: a new file, or one that this function wrote.
        networks: config and params of each, by the name of its folder; of one alone the names have no prefix.
        scheduler: the noise schedule.
        pad_id: the token that fills up prompts; None is the end token.
        spare: further tensors, stored as they are, unless a network has one of the name.
        metadata: further texts for the file's header.
        defaults: settings that the model is sampled with where a user gives none, as JSON values.
        dtype: float32, float16 or bfloat16, the type of the networks' weights; None is their own.

    Returns:
        What the metadata say of the configs: where they differ from what others take a file of this layout to be.

    Raises:
        ValueError: where the file is not ours to replace or cannot be written, a network has no place in the layout, or
            a weight does not fit into the type.
    """
    openclip = "unet" in networks and getattr(networks["unet"][0], "use_linear_projection", False)
    tensors: dict[str, np.ndarray] = {}
    for name, (config, params) in networks.items():
        place = _place(name, openclip, alone=len(networks) == 1)
        named = ldm.to_ldm(torch_views(params), _table(config, openclip))
        tensors |= {f"{place.prefix}{original}": array for original, array in named.items()}
    metadata = {name: text for name, text in (metadata or {}).items() if name != _SAID}
    alike = SingleFile(Path(path), tensors, metadata)  # as others read it
    said: dict[str, Any] = {}
    for name, (config, _) in networks.items():
        usual = {field.name: field.default for field in fields(config)} | alike._values(name)
        ours = _spelled(config)
        said[name] = {key: ours[key] for key in _UNSAID[name] if ours[key] != _json(usual[key])}
        wrong = {k: v for k, v in ours.items() if v != _spelled(from_dict(type(config), usual | said[name], name))[k]}
        if wrong:
            told = ", ".join(f"{key} {value!r}" for key, value in wrong.items())
            raise ValueError(f"The {name} cannot be written as one file, whose layout has no place for {told}.")
    if scheduler is not None:
        usual = to_dict(replace(_SCHEDULER, prediction_type=alike._prediction[0]))
        said["scheduler"] = {key: value for key, value in to_dict(scheduler).items() if value != usual[key]}
        if alike._prediction[1]:  # what is a guess for others is better said
            said["scheduler"]["prediction_type"] = scheduler.prediction_type
    said = {name: values for name, values in said.items() if values}
    if defaults:
        said["defaults"] = dict(defaults)
    if "text_encoder" in networks and pad_id != alike.layout.pad_id:
        said["pad_id"] = pad_id
    rest = {name: array for name, array in (spare or {}).items() if name not in tensors}
    with replaced_file(Path(path)) as new:
        write_safetensors(
            new,
            stored(tensors, dtype) | {name: Stored(array, array.dtype, checked=False) for name, array in rest.items()},
            metadata | _MARK | ({_SAID: json.dumps(said)} if said else {}),
        )
    return said


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A fresh file to write, which takes the place of `path` at the end, or vanishes when the writing fails.

    Raises:
        ValueError: where `path` is not ours to replace, or cannot be written.
    """
    check_file(path)
    new = path.absolute().with_name(f".{path.name}.new-{os.getpid()}")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        yield new
        new.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        new.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Refuses a file that `write_single` would not replace.

    Raises:
        ValueError: where `path` is a folder, or a file that this package did not write.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; choose a name that is new.")
    if path.exists():
        try:
            ours = read_metadata(path).get("written_by") == _MARK["written_by"]
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(f"{path} is a file that is not ours to replace; choose a name that is new.")


# Configs from shapes --------------------------------------------------------------------------------------------------


def _unet_values(shapes: Shapes, layout: _Layout) -> dict[str, Any]:
    levels = range(ldm.count_items(shapes, "down_blocks"))
    channels = tuple(_size(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in levels)
    layers = tuple(ldm.count_items(shapes, f"down_blocks.{i}.resnets") for i in levels)
    down, up = ([f"{way}_blocks.{i}.attentions.0.norm.weight" in shapes for i in levels] for way in ("down", "up"))
    # The last level's depth is the middle's (`jaxdiff.build`), and so is that of a level without attention, which has
    # none.
    deep = [f"down_blocks.{i}" if down[i] and i < len(levels) - 1 else "mid_block" for i in levels]
    depths = tuple(ldm.count_items(shapes, f"{block}.attentions.0.transformer_blocks") for block in deep)
    split = layout.head_channels
    return {
        "in_channels": _size(shapes, "conv_in.weight", 1),
        "out_channels": _size(shapes, "conv_out.weight", 0),
        "down_block_types": tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up),
        "block_out_channels": channels,
        "layers_per_block": _one(layers),
        "transformer_layers_per_block": _one(depths),
        "attention_head_dim": tuple(_HEADS if split is None else _heads(width, split) for width in channels),
        "cross_attention_dim": _size(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(_shape(shapes, "mid_block.attentions.0.proj_in.weight")) == 2,
        "norm_num_groups": 32,
    }


def _vae_values(shapes: Shapes, layout: _Layout) -> dict[str, Any]:
    levels = ldm.count_items(shapes, "encoder.down_blocks")
    channels = tuple(_size(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels))
    return {
        "in_channels": _size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _size(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _size(shapes, "post_quant_conv.weight", 0),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": channels,
        "layers_per_block": ldm.count_items(shapes, "encoder.down_blocks.0.resnets"),
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    }


def _text_values(shapes: Shapes, layout: _Layout) -> dict[str, Any]:
    vocabulary, width = (_size(shapes, "text_model.embeddings.token_embedding.weight", axis) for axis in (0, 1))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _size(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": ldm.count_items(shapes, "text_model.encoder.layers"),
        "num_attention_heads": _heads(width, _HEAD_CHANNELS),
        "max_position_embeddings": _size(shapes, "text_model.embeddings.position_embedding.weight", 0),
        "hidden_act": layout.activation,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


_VALUES = {"unet": _unet_values, "vae": _vae_values, "text_encoder": _text_values}
_CLASSES = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """A tensor's shape, which has two axes or more."""
    if len(shapes.get(name, ())) < 2:
        raise _NotThere(name)
    return shapes[name]


def _size(shapes: Shapes, name: str, axis: int) -> int:
    return _shape(shapes, name)[axis]


def _one(values: tuple[int, ...]) -> Any:
    """One number where all levels have the same."""
    return values[0] if values and values.count(values[0]) == len(values) else values


def _heads(channels: int, head_channels: int) -> int:
    """Heads of so many channels each; 0 where that is no whole number."""
    return 0 if channels % head_channels else channels // head_channels


def _used_layers(names: Iterable[str]) -> int:
    """Layers of OpenCLIP's tower that Stable Diffusion 2 uses: all but the last of a whole one.

    A file that was made from a diffusers folder has only those, and neither the projection nor the scale behind them.
    """
    names = set(names)
    layers = ldm.openclip_layers(names)
    whole = layers == _OPENCLIP_LAYERS or not names.isdisjoint({"text_projection", "logit_scale"})
    return layers - 1 if whole else layers


# Writing --------------------------------------------------------------------------------------------------------------


def _place(name: str, openclip: bool, alone: bool) -> _Place:
    places = [place for place in _PLACES if place.network == name]
    if name == "text_encoder":
        return next(place for place in places if place.openclip == openclip)
    return next(place for place in places if (place.prefix == "") == (alone and name == "vae"))


def _table(config: NetworkConfig, openclip: bool) -> ldm.Table:
    if isinstance(config, UNetConfig):
        attention = [block.startswith("CrossAttn") for block in config.up_block_types]
        return ldm.unet_table(config.per_level("layers_per_block"), attention)
    if isinstance(config, VAEConfig):
        return ldm.vae_table(len(config.block_out_channels), config.layers_per_block)
    if openclip:
        return ldm.openclip_table(config.num_hidden_layers)
    return {"text_model": "text_model"}


def _spelled(config: Any) -> dict[str, Any]:
    """A config's values as JSON has them, the UNet's in one spelling."""
    values = to_dict(config)
    if isinstance(config, UNetConfig):
        for name in ("layers_per_block", "transformer_layers_per_block"):
            values[name] = config.per_level(name)
        values |= {"attention_head_dim": config.heads, "num_attention_heads": None}
    return {name: _json(value) for name, value in values.items()}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _seems(names: Iterable[str]) -> str | None:
    """What a file of these names seems to be, if it is not one that is read."""
    names = list(names)
    return next((words for pattern, words in _OTHERS if any(re.search(pattern, name) for name in names)), None)
