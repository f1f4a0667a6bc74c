"""LoRA files and their kin, read: whose tensors they are, by every name that is in use, and whether they fit.

A name is a module's and a tensor's. Modules are looked up and never taken apart, since kohya's underscores say too
little: of each module of the model, all names that it may have are made.

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight     kohya, LyCORIS
    lora_unet_middle_block_1_proj_in.lora_down.weight             the same with the original names
    unet.mid_block.attentions.0.proj_in.lora_A.weight             diffusers and peft
    unet.mid_block.attentions.0.proj_in.lora.down.weight          diffusers, before
    unet....attn1.processor.to_q_lora.down.weight                 diffusers, at first
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.adapters.lora import KINDS, SHARED, Change, Merged
from jaxdiff.config import load_json
from jaxdiff.io import ldm
from jaxdiff.io.convert import leaves, torch_axes, torch_name
from jaxdiff.io.weights import FLOATS, listed, open_file
from jaxdiff.types import Params

logger = logging.getLogger(__name__)
Leaf = tuple[str, ...]

KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
"""What kohya's names of a network's modules begin with; the networks that files change, by diffusers' folders."""
TENSORS = {
    "lora_down": ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "lora_up": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "lora_mid": ("lora_mid.weight",),
    "dora_scale": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "ia3": ("weight",),
    "on_input": ("on_input",),
}
"""What files call tensors that have another name here; all others have the same in all files."""
_TENSORS = {name: name for name in SHARED.union(*(kind.names for kind in KINDS.values()))}
_TENSORS |= {theirs: ours for ours, spellings in TENSORS.items() for theirs in spellings}
_OF_IA3 = {"ia3", "on_input"}
_FIRST = re.compile(r"(.+?)(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_NAMED = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.default(?=\.|$)")  # peft's name of an adapter
_PEFT = "base_model.model."

# What a file is for that does not fit, by the names of its modules.
_OTHERS = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "Flux"),
    (r"joint_blocks|^transformer\.|^lora_transformer_", "a model whose denoiser is a transformer, such as SD3"),
    (r"lora_controlnet", "a Control-LoRA"),
)
_OF_XL = r"lora_te2_|text_encoder_2\.|label_emb|add_embedding|transformer_blocks[._][2-9]"
_XL = "Stable Diffusion XL"
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: _XL}
"""Models by the features that each has of a token of a prompt."""
_FLOATS = {*FLOATS.values(), np.dtype(np.float64)}
_MOST = 1e30
"""Beyond any alpha, and within float32."""


class LoRA(NamedTuple):
    """A file, and how strongly it is applied: 0 is not at all, 1 as it was trained."""

    path: Path
    strength: float = 1.0
    text_strength: float | None = None
    """That of what it changes of the text encoders; None is `strength`."""

    @classmethod
    def of(cls, value: Any) -> "LoRA":
        """From a path; a path and a strength; or a path, the denoiser's strength and the text encoders'.

        Raises:
            ValueError: where it is none of these, or a strength is no finite number.
        """
        match value:
            case LoRA():
                return value
            case str() | Path():
                return cls(Path(value))
            case (str() | Path() as path, *strengths) if len(strengths) in (1, 2):
                for strength in strengths:
                    number = isinstance(strength, int | float | np.number) and not isinstance(strength, bool)
                    if not number or not math.isfinite(strength):
                        raise ValueError(f"The strength of {path} is {strength!r}; it must be a finite number.")
                return cls(Path(path), *map(float, strengths))
        raise ValueError(f"A LoRA is {value!r}; give a file, a file and a strength, or those and the text encoders'.")

    def strength_in(self, network: str) -> float:
        """How strongly it is applied to a network, by its folder's name."""
        return self.strength if self.text_strength is None or network == "unet" else self.text_strength

    @property
    def values(self) -> dict[str, Any]:
        """It as images' metadata have it."""
        more = {} if self.text_strength is None else {"text_strength": self.text_strength}
        return {"file": self.path.as_posix(), "strength": self.strength} | more


class Module(NamedTuple):
    """A module of the model."""

    network: str
    name: str
    """As torch's."""


def merge_loras(networks: Mapping[str, Params], loras: Sequence[LoRA]) -> dict[str, Params]:
    """The params by network with LoRAs added: what they change is computed when it is used, all else is as it was.

    Args:
        networks: by diffusers' folder names; those of `KOHYA` can be changed.
        loras: any number, in any order; one of strength 0 is checked as any other.

    Raises:
        ValueError: as `read_lora` does.
    """
    changes: dict[tuple[str, Leaf], list[tuple[float, Change]]] = {}
    for lora in loras:
        for place, change in read_lora(lora.path, networks).items():
            if strength := lora.strength_in(place[0]):
                changes.setdefault(place, []).append((strength, change))

    def merged(network: str, params: Params, path: Leaf = ()) -> Params:
        tree: Params = {}
        for name, value in params.items():
            here = (*path, name)
            if isinstance(value, dict):
                tree[name] = merged(network, value, here)
            elif found := changes.get((network, here)):
                tree[name] = Merged(value, torch_axes(here, value.ndim), tuple(found))
            else:
                tree[name] = value
        return tree

    return {network: merged(network, params) for network, params in networks.items()}


def read_lora(path: Path, networks: Mapping[str, Params]) -> dict[tuple[str, Leaf], Change]:
    """What a file changes: by the network and the path of a leaf.

    Tensors without a place in the model are told in a warning.

    Args:
        path: a safetensors file, or one of torch.save.
        networks: their params, by diffusers' folder names.

    Raises:
        ValueError: where the file is missing or damaged, is for another model, changes nothing, or does not fit,
            naming modules and both shapes.
    """
    tensors, said = _open(path)
    places = {
        (network, torch_name(leaf)): (leaf, tuple(array.shape[axis] for axis in torch_axes(leaf, len(array.shape))))
        for network in KOHYA.keys() & networks.keys()
        for leaf, array in leaves(networks[network])
    }
    modules, unknown = _by_module(tensors, _spellings(places))
    found: dict[tuple[str, Leaf], Change] = {}
    faults: dict[str, str] = {}
    for module, (given, names) in modules.items():
        own = _checked(path, given, names)
        if "lora_down" in own and "alpha" not in own:
            alpha = _alpha(path, said, module, own["lora_down"].shape[0])
            own |= {} if alpha is None else {"alpha": np.float32(alpha)}
        for of in ("weight", "bias"):
            kinds = tuple(kind for kind, (_, its, what) in KINDS.items() if what == of and its & own.keys())
            if not kinds:
                continue
            where = f"{module.network} {module.name}.{of}"
            leaf, shape = places.get((module.network, f"{module.name}.{of}"), ((), None))
            if shape is None:
                faults[where] = "the model has none"
                continue
            change = Change(kinds, own)
            try:
                change.check(shape)
            except ValueError as error:
                faults[where] = str(error)
            found[module.network, leaf] = change
        changed = any(its & own.keys() for _, its, _ in KINDS.values())
        unknown += [name for ours, name in names.items() if not changed or ours in own.keys() & _OF_IA3]
    if (unknown or faults) and (other := _seems_to_be(tensors, networks)):
        raise ValueError(f"{path} is for {other}, and does not fit this model.")
    if faults:
        told = "; ".join(f"{where}: {faults[where]}" for where in sorted(faults)[:10])
        raise ValueError(f"{path} does not fit the model in {len(faults)} places: {told}.")
    if not found:
        raise ValueError(f"{path} changes nothing of the model; its tensors are {listed(tensors) or 'none'}.")
    if unknown:
        logger.warning("%s: %d tensors have no place in the model: %s.", path, len(unknown), listed(unknown))
    return found


def _open(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A file's tensors by name, and what is said of them beside: peft's settings by network."""
    tensors, metadata = open_file(path)
    said: Any = {}
    if metadata is None:  # a file of torch.save, in which nothing stands beside tensors
        return tensors, said
    if text := metadata.get("lora_adapter_metadata"):
        try:
            said = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its lora_adapter_metadata is not JSON.") from error
    elif any(name.startswith(_PEFT) for name in tensors):
        config = path.parent / "adapter_config.json"
        if config.is_file():
            said = {f"{network}.{key}": value for key, value in load_json(config).items() for network in KOHYA}
        else:
            logger.warning("%s has no adapter_config.json beside it; alpha is taken for the rank.", path)
    if not isinstance(said, dict):
        raise ValueError(f"{path} is damaged: its lora_adapter_metadata is no table.")
    return tensors, said


def _spellings(places: Iterable[tuple[str, str]]) -> dict[str, Module]:
    """Every name that a file may have for each module, from the networks' and tensors' names."""
    found: dict[str, Module] = {}
    modules = sorted({(network, name.rpartition(".")[0]) for network, name in places})
    table = _original({name for network, name in modules if network == "unet"})
    for network, name in modules:
        module = Module(network, name)
        spelled = {name, name.removeprefix("text_model.")}
        original = ldm.translate(name, table) if network == "unet" else None
        found |= dict.fromkeys((f"{network}.{one}" for one in spelled), module)
        found = dict.fromkeys(spelled, module) | found  # without a network, text encoders' are the first one's
        for prefix in KOHYA[network]:
            for one in spelled | ({original} if original else set()):
                found[prefix + one.replace(".", "_")] = module
    return found


def _original(modules: set[str]) -> ldm.Table:
    """The table of original names for a UNet of these modules."""
    blocks = range(ldm.count_items(modules, "down_blocks"))
    layers = [ldm.count_items(modules, f"down_blocks.{i}.resnets") for i in blocks]
    attention = [ldm.count_items(modules, f"up_blocks.{i}.attentions") > 0 for i in blocks]
    return ldm.unet_table(layers, attention)


def _by_module(
    tensors: Mapping[str, np.ndarray], spellings: Mapping[str, Module]
) -> tuple[dict[Module, tuple[dict[str, np.ndarray], dict[str, str]]], list[str]]:
    """Each module's tensors by their names here, with the names that they have in the file; and what is left over."""
    modules: dict[Module, tuple[dict[str, np.ndarray], dict[str, str]]] = {}
    unknown = []
    for name, array in tensors.items():
        spelled, ours = _split(_NAMED.sub(r".\1", name.removeprefix(_PEFT)))
        module = spellings.get(spelled)
        if module is None or ours is None:
            unknown.append(name)
            continue
        own, names = modules.setdefault(module, ({}, {}))
        if ours in own:
            raise ValueError(f"{names[ours]} and {name} are both the {ours} of {module.name}.")
        own[ours], names[ours] = array, name
    return modules, unknown


def _split(name: str) -> tuple[str, str | None]:
    """The module's and the tensor's name; the latter is None where nothing here has it."""
    if old := _FIRST.fullmatch(name):
        attention, which, half = old.groups()
        if attention.endswith("self_attn"):
            return f"{attention}.{which}_proj", f"lora_{half}"
        return f"{attention}.to_{which}{'.0' if which == 'out' else ''}", f"lora_{half}"
    parts = name.split(".")
    for count in (3, 2, 1):  # a tensor's name has at most so many parts, and the longest counts
        if len(parts) > count and (ours := _TENSORS.get(".".join(parts[-count:]))):
            return ".".join(parts[:-count]), ours
    return name, None


def _checked(path: Path, given: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """A module's tensors, once they are known to be finite numbers, in the form that formulas take."""
    own = dict(given)
    for name, array in own.items():
        if not array.size:
            raise ValueError(f"{path}: {names[name]} is empty.")
        if array.dtype not in _FLOATS and name not in ("alpha", "on_input"):
            raise ValueError(f"{path}: {names[name]} is {array.dtype}; supported are {listed(map(str, _FLOATS))}.")
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(array, np.float32)).all()
        if not finite:
            raise ValueError(f"{path}: {names[name]} is not finite.")
        if (array.size > 1) if name in ("alpha", "on_input") else not array.ndim:
            raise ValueError(f"{path}: {names[name]} has the shape {list(array.shape)}, which makes no sense.")
    if "alpha" in own:
        own["alpha"] = own["alpha"].reshape(())
    if "lora_magnitude_vector" in names.get("dora_scale", ""):  # always of outputs, and of kernels as [1 o 1 1]
        own["dora_scale"] = own["dora_scale"].reshape(-1)
    if own.keys() >= _OF_IA3:
        own["ia3_in" if own.pop("on_input").reshape(()) else "ia3_out"] = own.pop("ia3")
    return own


def _alpha(path: Path, said: Mapping[str, Any], module: Module, rank: int) -> float | None:
    """A module's alpha by peft's settings; None where they say nothing."""

    def setting(name: str) -> Any:
        return said.get(f"{module.network}.{name}")

    patterns = setting("alpha_pattern") or {}
    alpha = setting("lora_alpha")
    if isinstance(patterns, dict):
        own = [value for key, value in patterns.items() if f".{module.name}".endswith(f".{key.lstrip('^')}")]
        alpha = own[0] if own else alpha
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < _MOST:
        raise ValueError(f"{path}: the alpha of {module.name} is {str(alpha)[:40]!r}; it must be a finite number.")
    return float(alpha * math.sqrt(rank) if setting("use_rslora") else alpha)


def _seems_to_be(tensors: Mapping[str, np.ndarray], networks: Mapping[str, Params]) -> str | None:
    """What other model than that of these networks the file is for, if that can be told."""
    for pattern, model in _OTHERS:
        if any(re.search(pattern, name) for name in tensors):
            return model

    def from_prompts() -> Iterator[np.ndarray]:
        for name, array in tensors.items():
            if re.search(r"attn2[._](processor\.)?to_[kv]", name) and array.ndim > 1:
                yield array

    if "text_encoder_2" not in networks and any(re.search(_OF_XL, name) for name in tensors):
        return _XL
    own = {
        leaf.shape[0] for place, leaf in leaves(networks.get("unet", {})) if place[-3:] == ("attn2", "to_k", "kernel")
    }
    widths = {array.shape[1] for array in from_prompts()} - own
    return next((model for width, model in _WIDTHS.items() if own and width in widths), None)
