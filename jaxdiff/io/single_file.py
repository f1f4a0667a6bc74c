"""Models in one file, in the original layout of Stable Diffusion 1, 2 and XL: `.safetensors`, `.ckpt` of torch.save,
or `.gguf` in blocks of a few bits.

Such a file holds tensors by their names in the original code and nothing else. Its networks' sizes are found from the
names and shapes. What these do not say is what the known layouts have (`jaxdiff.io.layouts`); a file that was
written here says in its metadata where it differs.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxdiff.config import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig, from_dict, naming, to_dict
from jaxdiff.io import ldm
from jaxdiff.io.convert import from_torch, torch_views
from jaxdiff.io.gguf import HostArray
from jaxdiff.io.layouts import (
    CLASSES,
    EMA,
    HEAD_CHANNELS,
    IGNORED,
    PLACES,
    REFINER,
    SCHEDULER,
    SD1,
    SD2,
    SDXL,
    UNSAID,
    VALUES,
    Layout,
    NotThere,
    Place,
    one_value,
    place_to_write,
    seems_to_be,
    used_layers,
    xl_layout,
)
from jaxdiff.io.weights import Stored, listed, open_model, read_metadata, stored, write_safetensors
from jaxdiff.types import Params

NetworkConfig = UNetConfig | VAEConfig | CLIPTextConfig
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
logger = logging.getLogger(__name__)
_SAID = "jaxdiff"
_MARK = {"format": "pt", "written_by": "jaxdiff"}


@dataclass(frozen=True)
class SingleFile:
    """A file's tensors, mapped, and what is found in them. Made by `open_single`."""

    path: Path
    tensors: Mapping[str, HostArray]
    """By the file's own names."""
    metadata: Mapping[str, str]
    prediction_type: str | None = None
    """What the denoiser predicts, where the user says it."""
    ema: bool = False
    """Takes the denoiser's averaged weights in place of the last ones; other networks have none."""

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each network is that the file has."""
        found = {}
        for place in PLACES:
            if place.prefix + place.anchor in self.tensors:
                found.setdefault(place.network, place)
        return found

    @cached_property
    def layout(self) -> Layout:
        """The layout that the file seems to have: the text towers tell it, or what the denoiser reads."""
        if "text_encoder_2" in self.places:
            return SDXL if "text_encoder" in self.places else REFINER
        if "text_encoder" in self.places and self.places["text_encoder"].xl:
            return SDXL
        if "unet" in self.places:
            prefix = self.places["unet"].prefix
            context = self.tensors.get(f"{prefix}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
            if "text_encoder" not in self.places and f"{prefix}label_emb.0.0.weight" in self.tensors:
                return xl_layout(0 if context is None or context.ndim < 2 else context.shape[1])
            flat = [
                a.ndim == 2 for n, a in self.tensors.items() if n.startswith(prefix) and n.endswith("proj_in.weight")
            ]
            return SD2 if flat and flat[0] else SD1
        return SD2 if "text_encoder" in self.places and self.places["text_encoder"].openclip else SD1

    @cached_property
    def said(self) -> dict[str, Any]:
        """What the metadata say of the configs, of a file that was written here."""
        try:
            said = json.loads(self.metadata.get(_SAID, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged: {_SAID!r} of its metadata is not JSON.") from error
        if not isinstance(said, dict) or not all(
            isinstance(said.get(part, {}), dict) for part in (*UNSAID, "defaults")
        ):
            raise ValueError(f"{self.path} is damaged: {_SAID!r} of its metadata is no object of objects.")
        return said

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that the model is sampled with where a user gives none, of a file that was written here."""
        return self.said.get("defaults", {"sampler": "euler"} if self.layout.numbers is not None else {})

    @property
    def pad_id(self) -> int | None:
        """The token that fills up the first text encoder's prompts; None is the end token."""
        return self.pads.get("text_encoder", self.pads.get("text_encoder_2"))

    @property
    def pads(self) -> dict[str, int | None]:
        """The token that fills up prompts, for each text encoder; None is the end token."""
        usual = {"text_encoder": self.layout.pad_id, "text_encoder_2": _PAD_2}
        pads = {name: self.said.get(_PADS[name], pad) for name, pad in usual.items() if name in self.places}
        for name, pad in pads.items():
            if pad is not None and not (type(pad) is int and 0 <= pad < 2**31):
                raise ValueError(
                    f"{self.path} is damaged: {_PADS[name]} of its metadata is {pad!r}, not a token's number."
                )
        return pads

    @property
    def zero_empty(self) -> bool:
        """Whether an empty negative prompt is zeros."""
        return bool(self.said.get("zero_empty", self.layout is SDXL))

    def network(self, name: str) -> tuple[Any, Params]:
        """The config and the params of one network, such as "unet", in the type that they are stored in.

        Raises:
            ValueError: where the file lacks the network, the averages, or a tensor that its sizes are found from.
        """
        config, found = self.config(name), self._found(name)
        average = self.ema and name == "unet"
        with naming(self.path):
            return config, from_torch(
                (ours, self._average(original) if average else array) for ours, (original, array) in found.items()
            )

    def config(self, name: str) -> Any:
        """The config of one network, such as "unet".

        Raises:
            ValueError: as `network`.
        """
        values = self._values(name) | {key: v for key, v in self.said.get(name, {}).items() if key in UNSAID[name]}
        if name == "unet" and isinstance(heads := values["attention_head_dim"], list | tuple):
            values["attention_head_dim"] = one_value(tuple(heads))
        heads = values["num_attention_heads"] if name in _PADS else values.get("attention_head_dim")
        if 0 in (heads if isinstance(heads, tuple) else (heads,)):
            raise ValueError(
                f"{self.path} does not say how many heads its {name} has; in {self.layout.name} they have "
                f"{HEAD_CHANNELS} channels each, of which its widths are no multiples."
            )
        return self._made(CLASSES[name], values)

    def _values(self, name: str) -> dict[str, Any]:
        """The values of a network's config, by its shapes and the layout."""
        try:
            values = VALUES[name]({ours: array.shape for ours, (_, array) in self._found(name).items()}, self.layout)
        except NotThere as missing:
            raise ValueError(
                f"{self.path}: the {name} is not whole: {missing} is missing, or of no shape that a {name} has. "
                "Download or save it again."
            ) from missing
        if name == "unet":
            values["sample_size"] = self._side
            if self.layout.numbers is not None and "text_encoder_2" in self.places:
                pooled = self._values("text_encoder_2")["projection_dim"]
                features = values["projection_class_embeddings_input_dim"] - pooled
                values["addition_time_embed_dim"] = features // self.layout.numbers
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
        values = to_dict(SCHEDULER) | {"rescale_betas_zero_snr": "ztsnr" in self.tensors}
        values |= self.said.get("scheduler", {}) | {"prediction_type": found}
        return self._made(SchedulerConfig, values)

    def _made(self, cls: type, values: Mapping[str, Any]) -> Any:
        with naming(self.path):
            return from_dict(cls, dict(values), cls.__name__)

    @property
    def told_prediction(self) -> str | None:
        """What the user or the file says that the denoiser predicts; None where neither does."""
        told = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
        if self.prediction_type is not None:
            return self.prediction_type
        if "prediction_type" in (said := self.said.get("scheduler", {})):
            return str(said["prediction_type"])
        if (word := self.metadata.get("modelspec.prediction_type")) in told:  # by the standard of Stability AI
            return told[word]
        return "v_prediction" if self.layout is not SD2 and "v_pred" in self.tensors else None

    @cached_property
    def _prediction(self) -> tuple[str, bool]:
        """What the denoiser predicts, and whether that is a guess: of SD2 there are models of both kinds."""
        if (told := self.told_prediction) is not None:
            return told, False
        if self.layout is not SD2:
            return "epsilon", False
        inpaints = "unet" in self.places and self.tensors[self._anchor("unet")].shape[1:2] == (9,)
        return ("epsilon" if inpaints else "v_prediction"), True

    @property
    def _side(self) -> int:
        """Latent pixels along each side that the published model of the layout was trained at."""
        return 96 if self.layout is SD2 and self._prediction[0] == "v_prediction" else self.layout.side

    @cached_property
    def spare(self) -> dict[str, HostArray]:
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
                f"{prefix}transformer.resblocks.{i}." for i in range(used_layers(names), ldm.openclip_layers(names))
            )
        return [name for name in self.spare if not IGNORED.fullmatch(name) and not name.startswith(blocks or "\0")]

    def warn_of_unknown(self) -> None:
        """Says in a warning which tensors are left out that nobody here knows."""
        if self.unknown:
            logger.warning(
                "%s: %d tensors are left out, which are of no known use: %s.",
                self.path, len(self.unknown), listed(self.unknown),
            )  # fmt: skip

    def _anchor(self, name: str) -> str:
        return self.places[name].prefix + self.places[name].anchor

    def _found(self, name: str) -> dict[str, tuple[str, HostArray]]:
        """A network's tensors by diffusers' names, each with the file's own name."""
        if name not in self._networks:
            if name not in self.places:
                wanted = next(place for place in PLACES if place.network == name)
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
            elif name == "text_encoder_2":
                table = ldm.openclip_table(ldm.openclip_layers(inside), projection=True)
            elif place.openclip:
                table = ldm.openclip_table(used_layers(inside))
            else:
                head = "text_model." if place.anchor.startswith("text_model.") else ""
                table = {f"text_model.{part}": f"{head}{part}" for part in _CLIP_PARTS}
                inside = {n: a for n, a in inside.items() if not n.endswith(".position_ids")}
            found = ldm.from_ldm(inside, table)
            self._networks[name] = {n: (place.prefix + original, a) for n, (original, a) in found.items()}
        return self._networks[name]

    @cached_property
    def _networks(self) -> dict[str, dict[str, tuple[str, HostArray]]]:
        return {}

    @property
    def seems(self) -> str:
        """What the file seems to be, in words."""
        if self.places:
            return " and ".join(f"a {name}" for name in self.places) + " alone"
        return (
            seems_to_be(self.tensors) or f"none that is known, with tensors such as {listed(sorted(self.tensors)[:3])}"
        )

    def _flat(self, original: str) -> str:
        """The name of a weight's average."""
        name = original.removeprefix(self.places["unet"].prefix)
        return f"{EMA}diffusion_model{name.replace('.', '')}"

    def _average(self, original: str) -> HostArray:
        if (array := self.tensors.get(self._flat(original))) is None:
            raise ValueError(
                f"{self.path} has no averaged (EMA) weights: {self._flat(original)} is missing; load it without ema."
            )
        return array


_PADS = {"text_encoder": "pad_id", "text_encoder_2": "pad_id_2"}
"""What a file's metadata call the token that fills up prompts, for each text encoder."""
_PAD_2 = 0
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
    tensors, metadata = open_model(path)
    file = SingleFile(path, tensors, metadata or {}, prediction_type, ema)
    if other := seems_to_be(file.tensors):
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
    pads: Mapping[str, int | None] | None = None,
    spare: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    zero_empty: bool | None = None,
) -> dict[str, Any]:
    """Writes a safetensors file in the original layout, whole or not at all.

    What the layout does not say and other programs would take otherwise stands in the metadata, which `open_single`
    reads.

    Args:
        path: a new file, or one that this function wrote.
        networks: config and params of each, by the name of its folder; of one alone the names have no prefix.
        scheduler: the noise schedule.
        pads: the token that fills up prompts, for each text encoder; None is the end token.
        spare: further tensors, stored as they are, unless a network has one of the name.
        metadata: further texts for the file's header.
        defaults: settings that the model is sampled with where a user gives none, as JSON values.
        dtype: float32, float16 or bfloat16, the type of the networks' weights; None is their own.
        zero_empty: whether an empty negative prompt is zeros; None is what is usual.

    Returns:
        What the metadata say of the configs: where they differ from what others take a file of this layout to be.

    Raises:
        ValueError: where the file is not ours to replace or cannot be written, a network has no place in the layout, or
            a weight does not fit into the type.
    """
    layout = _layout_to_write(networks)
    tensors: dict[str, np.ndarray] = {}
    for name, (config, params) in networks.items():
        place = place_to_write(name, layout, layout is SD2, alone=len(networks) == 1)
        named = ldm.to_ldm(torch_views(params), _table(name, config, place.openclip))
        tensors |= {f"{place.prefix}{original}": array for original, array in named.items()}
    metadata = {name: text for name, text in (metadata or {}).items() if name != _SAID}
    alike = SingleFile(Path(path), tensors, metadata)  # as others read it
    said: dict[str, Any] = {}
    for name, (config, _) in networks.items():
        usual = {field.name: field.default for field in fields(config)} | alike._values(name)
        ours = _spelled(config)
        said[name] = {key: ours[key] for key in UNSAID[name] if ours[key] != _json(usual[key])}
        wrong = {k: v for k, v in ours.items() if v != _spelled(from_dict(type(config), usual | said[name], name))[k]}
        if wrong:
            told = ", ".join(f"{key} {value!r}" for key, value in wrong.items())
            raise ValueError(f"The {name} cannot be written as one file, whose layout has no place for {told}.")
    if scheduler is not None:
        usual = to_dict(replace(SCHEDULER, prediction_type=alike._prediction[0]))
        said["scheduler"] = {key: value for key, value in to_dict(scheduler).items() if value != usual[key]}
        if alike._prediction[1]:  # what is a guess for others is better said
            said["scheduler"]["prediction_type"] = scheduler.prediction_type
    said = {name: values for name, values in said.items() if values}
    if dict(defaults or {}) != alike.defaults:
        said["defaults"] = {"sampler": "ddim"} | dict(defaults or {}) if alike.defaults else dict(defaults or {})
    if zero_empty not in (None, alike.zero_empty):
        said["zero_empty"] = zero_empty
    said |= {_PADS[name]: pad for name, pad in (pads or {}).items() if pad != alike.pads[name]}
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
        with suppress(OSError):
            new.unlink()


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


# Writing --------------------------------------------------------------------------------------------------------------


def _layout_to_write(networks: Mapping[str, tuple[Any, Params]]) -> Layout:
    """The layout of these networks."""
    unet = networks["unet"][0] if "unet" in networks else None
    if "text_encoder_2" in networks:
        return SDXL if "text_encoder" in networks else REFINER
    if unet is not None and unet.addition_embed_type is not None:
        return xl_layout(unet.cross_attention_dim)
    return SD2 if unet is not None and unet.use_linear_projection else SD1


def _table(name: str, config: NetworkConfig, openclip: bool) -> ldm.Table:
    if isinstance(config, UNetConfig):
        attention = [block.startswith("CrossAttn") for block in config.up_block_types]
        return ldm.unet_table(config.per_level("layers_per_block"), attention)
    if isinstance(config, VAEConfig):
        return ldm.vae_table(len(config.block_out_channels), config.layers_per_block)
    if openclip:
        return ldm.openclip_table(config.num_hidden_layers, projection=name == "text_encoder_2")
    return {"text_model": "text_model"}


def _spelled(config: Any) -> dict[str, Any]:
    """A config's values as JSON has them, the UNet's in one spelling."""
    values = to_dict(config)
    if isinstance(config, UNetConfig):
        for name in ("layers_per_block", "transformer_layers_per_block"):
            values[name] = config.per_level(name)
        # A level without attention has no depth, whatever a config says of it.
        attends = [block.startswith("CrossAttn") for block in config.down_block_types]
        attends_up = [block.startswith("CrossAttn") for block in reversed(config.up_block_types)]
        deepest = values["transformer_layers_per_block"][-1]
        values["transformer_layers_per_block"] = tuple(
            depth if down or up else deepest
            for depth, down, up in zip(values["transformer_layers_per_block"], attends, attends_up, strict=True)
        )
        values |= {"attention_head_dim": config.heads, "num_attention_heads": None}
    return {name: _json(value) for name, value in values.items()}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
