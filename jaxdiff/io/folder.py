"""The diffusers folder layout, both ways: `model_index.json`, and a folder for each network, scheduler, tokenizer."""

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike

from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ImageNormalizerConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
    load_json,
    naming,
    to_dict,
)
from jaxdiff.io.configs import TRANSFORMERS_IGNORED, one_spelling, read_values
from jaxdiff.io.convert import from_torch, torch_views
from jaxdiff.io.scheduler import MARK, read_scheduler, scheduler_class, scheduler_values
from jaxdiff.io.single_file import SingleFile, is_single, open_single
from jaxdiff.io.weights import Stored, open_safetensors, open_weights, read_metadata, stored, write_safetensors
from jaxdiff.types import Params

NetworkConfig = UNetConfig | VAEConfig | CLIPTextConfig | CLIPVisionConfig | ImageNormalizerConfig
logger = logging.getLogger(__name__)


@runtime_checkable
class TokenizerFiles(Protocol):
    """Whatever can write `vocab.json`, `merges.txt` and their companions, as `jaxdiff.data.tokens.Tokenizer` can."""

    def save(self, folder: Path) -> None:
        """Writes the files into an existing folder."""
        ...


class _Network(NamedTuple):
    """What a network's folder is called inside, and which values its config may have where only some are supported.

    A field that is in neither table and not in our dataclass may still be there if it is off: null, false or 0.
    """

    config: type[NetworkConfig]
    library: str
    cls: str
    stem: str
    only: Mapping[str, tuple[Any, ...]]
    ignored: frozenset[str]
    left_out: Mapping[str, Any] = {}
    """What a file may leave out, where the library's default is not ours."""


UNET_ONLY: dict[str, tuple[Any, ...]] = {
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
}
_TEXT_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_text_model", "clip"),
    "use_attention_mask": (False,),
}
# Softmax is always float32 here, so `upcast_attention` asks for nothing. The other fields belong to training, or to
# blocks and embeddings that are refused by their types.
UNET_IGNORED = frozenset({
    "upcast_attention", "dropout", "addition_embed_type_num_heads", "resnet_skip_time_act", "resnet_out_scale_factor",
    "cross_attention_norm", "mid_block_only_cross_attention",
})  # fmt: skip
_TEXT_LEFT_OUT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
NETWORKS = {
    "unet": _Network(UNetConfig, "diffusers", "UNet2DConditionModel", "diffusion_pytorch_model", UNET_ONLY,
                     UNET_IGNORED),
    "vae": _Network(VAEConfig, "diffusers", "AutoencoderKL", "diffusion_pytorch_model", {},
                    # Of these diffusers' pipeline for Stable Diffusion takes no notice.
                    frozenset({"force_upcast", "shift_factor", "latents_mean", "latents_std"}),
                    {"layers_per_block": 1}),
    "text_encoder": _Network(CLIPTextConfig, "transformers", "CLIPTextModel", "model", _TEXT_ONLY, TRANSFORMERS_IGNORED,
                             _TEXT_LEFT_OUT),
    "text_encoder_2": _Network(CLIPTextConfig, "transformers", "CLIPTextModelWithProjection", "model", _TEXT_ONLY,
                               TRANSFORMERS_IGNORED, _TEXT_LEFT_OUT),
    "image_encoder": _Network(CLIPVisionConfig, "transformers", "CLIPVisionModelWithProjection", "model",
                              {"model_type": ("clip_vision_model",)}, TRANSFORMERS_IGNORED),
    "image_normalizer": _Network(ImageNormalizerConfig, "stable_diffusion", "StableUnCLIPImageNormalizer",
                                 "diffusion_pytorch_model", {}, frozenset()),
}  # fmt: skip
NOISINGS = ("image_noising_scheduler", "low_res_scheduler")
"""The folder of the noise schedule of an image that the denoiser reads."""
PROCESSOR = "feature_extractor"
"""The folder that says how images become what an image encoder reads."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The folder of each text encoder's tokenizer."""

UNMAPPED = "unmapped.safetensors"
"""In a folder that was made of a single file, the tensors that have no place in a folder."""


class Part(NamedTuple):
    """A folder of a model that holds one JSON file."""

    library: str
    cls: str
    file: str
    values: Mapping[str, Any]


class Unmapped(NamedTuple):
    """What a single file had beside its networks."""

    tensors: Mapping[str, np.ndarray]
    """By the file's names."""
    metadata: Mapping[str, str]
    """Texts of the file's header."""


# Parts of which nothing is read: an image's depth is given as a map.
UNREAD = ("safety_checker", "feature_extractor", "depth_estimator")
# Other classes of which a part serves as the network.
ALSO = {"text_encoder": (["transformers", "CLIPTextModelWithProjection"],)}
_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json")  # fmt: skip
DEFAULTS = "_defaults"
"""In `model_index.json`, settings that the model is sampled with where a user gives none."""
# The layout is this version's; below 0.9 diffusers would change `sample_size` on reading.
_VERSION = {"_diffusers_version": "0.42.0"}


def read_index(path: Path | str) -> dict[str, Any]:
    """`model_index.json`, after a check that the folder holds networks of `NETWORKS` and no others.

    Raises:
        ValueError: in one sentence, naming the file and what is missing or not supported.
    """
    path = Path(path)
    _check_exists(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give a diffusers model folder, a run directory or a single file.")
    index_file = path / "model_index.json"
    if not index_file.exists():
        raise ValueError(f"{path} has no model_index.json; it is not a diffusers model folder, or only half of one.")
    index = load_json(index_file)
    parts = {name: [network.library, network.cls] for name, network in NETWORKS.items()}
    for name, value in index.items():
        if not isinstance(value, list) or value == [None, None] or name in UNREAD:
            continue
        if name.partition("_")[0] == "controlnet":
            logger.warning("%s has a %s, which is left out; give it by --control %s.", path, name, path / name)
            continue
        if name in parts and value not in (parts[name], *ALSO.get(name, ())):
            raise ValueError(f"{index_file}: {name} is {value}; supported: {parts[name]}.")
        if name not in parts and name not in ("scheduler", *NOISINGS, *TOKENIZERS.values()):
            raise ValueError(f"{index_file}: {name} is {value}; models with such a part are not supported.")
    return index


def networks_of(index: Mapping[str, Any]) -> set[str]:
    """The folders of the networks that a `model_index.json` names."""
    return {name for name in NETWORKS if name in index and index[name] != [None, None]}


def read_network(path: Path | str, name: str, variant: str | None = None) -> tuple[Any, Params]:
    """The config and the params of one network ("unet", "vae" or "text_encoder") of a model, in the type stored there.

    The shapes are not checked here: `jaxdiff.io.weights.check_params` compares them with what the network wants.

    Args:
        path: as in `find_part`.
        name: the network.
        variant: "fp16" and the like, for folders with several sets of weights.

    Raises:
        ValueError: in one sentence, naming the file and, for a setting that is not supported, the field and its value.
    """
    if is_single(path):
        file = open_single(path)
        file.warn_of_unknown()
        return file.network(name)
    config = read_config(path, name)
    folder = find_part(path, name)
    tensors = open_weights(folder, NETWORKS[name].stem, variant)
    with naming(folder):
        return config, from_torch(tensors.items())


def read_config(path: Path | str, name: str) -> Any:
    """The config of one network ("unet", "vae" or "text_encoder") of a model, without its weights.

    Raises:
        ValueError: as `read_network`.
    """
    if is_single(path):
        return open_single(path).config(name)
    network = NETWORKS[name]
    file = find_part(path, name) / "config.json"
    values = one_spelling(load_json(file))
    return read_values(file, values, network.config, network.only, network.ignored, network.left_out)


def write_folder(
    path: Path | str,
    networks: Mapping[str, tuple[NetworkConfig, Params]],
    scheduler: SchedulerConfig,
    tokenizer: Path | TokenizerFiles | None,
    defaults: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = np.float32,
    unmapped: Unmapped | None = None,
    tokenizer_2: TokenizerFiles | None = None,
    about: Mapping[str, Any] | None = None,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Writes what `diffusers.StableDiffusionPipeline.from_pretrained` loads; all of it, or nothing.

    diffusers reads a `steps_offset` other than 1 as 1 and `clip_sample` as off: such a model draws other images there,
    and a warning is logged. A flow's scheduler is its FlowMatchEulerDiscreteScheduler.

    Args:
        path: a new or empty folder, or one that this function wrote.
        networks: config and params of each, by the name of its folder.
        scheduler: the noise schedule.
        tokenizer: a folder of its files, or a tokenizer that can write them; None without a text encoder.
        defaults: settings that the model is sampled with where a user gives none, as JSON values.
        dtype: float32, float16 or bfloat16, the type of the stored weights; None is each one's own.
        unmapped: what a single file had that has no place in a folder.
        tokenizer_2: the second text encoder's tokenizer.
        about: further values of `model_index.json`, such as its `_class_name`.
        parts: further folders, of `NOISINGS` and `PROCESSOR`.

    Raises:
        ValueError: when the folder holds anything else or cannot be written, a weight does not fit into the type, or
            the tokenizer's files are gone.
    """
    if isinstance(tokenizer, Path):
        _check_tokenizer(tokenizer)
    flow = scheduler.prediction_type == "flow_prediction"
    about = {"_class_name": "StableDiffusionPipeline"} | dict(about or {})
    changed = not flow and about["_class_name"] == "StableDiffusionPipeline"
    if changed and (scheduler.steps_offset != 1 or scheduler.clip_sample):
        logger.warning(
            "diffusers' StableDiffusionPipeline takes steps_offset as 1 and clip_sample as False; this model has %s "
            "and %s, and its images will differ there.",
            scheduler.steps_offset,
            scheduler.clip_sample,
        )
    with replaced(*_target(Path(path))) as new:
        for name, (config, params) in networks.items():
            (new / name).mkdir()
            _write_network(new / name, NETWORKS[name], config, params, dtype)
        (new / "scheduler").mkdir()
        cls = scheduler_class(scheduler, (defaults or {}).get("sampler"))
        values = {"_class_name": cls} | _VERSION | scheduler_values(scheduler)
        _write_json(new / "scheduler" / "scheduler_config.json", values)
        for name, part in (parts or {}).items():
            (new / name).mkdir()
            _write_json(new / name / part.file, dict(part.values))
        readers = [name for name in networks if name in TOKENIZERS]
        readers = readers or ([] if tokenizer is None else ["text_encoder"])
        for name, own in zip(readers, (tokenizer, tokenizer_2), strict=False):
            folder = new / TOKENIZERS[name]
            folder.mkdir()
            if isinstance(own, Path):
                for file in _TOKENIZER_FILES:
                    if (own / file).exists():
                        shutil.copyfile(own / file, folder / file)
            elif own is not None:
                own.save(folder)
        safety = {"requires_safety_checker": False, "safety_checker": [None, None]}
        missing = ("text_encoder", "tokenizer") if readers == ["text_encoder_2"] else ()
        index = {
            **about,
            **_VERSION,
            **MARK,
            **({DEFAULTS: dict(defaults)} if defaults else {}),
            "feature_extractor": [None, None],
            **(safety if about["_class_name"] == "StableDiffusionPipeline" else {}),
            "scheduler": ["diffusers", cls],
            **{TOKENIZERS[name]: ["transformers", "CLIPTokenizer"] for name in readers},
            **{name: [None, None] for name in missing},
            **{name: [NETWORKS[name].library, NETWORKS[name].cls] for name in networks},
            **{name: [part.library, part.cls] for name, part in (parts or {}).items()},
        }
        _write_json(new / "model_index.json", index)
        _write_unmapped(new, unmapped)


def write_network(
    path: Path | str,
    name: str,
    config: NetworkConfig,
    params: Params,
    dtype: DTypeLike | None = np.float32,
    unmapped: Unmapped | None = None,
) -> None:
    """Writes one network ("unet", "vae" or "text_encoder") as `path/name/`; `read_network` and diffusers load it.

    Raises:
        ValueError: as `write_folder`.
    """
    network = NETWORKS[name]
    with replaced(*_target(Path(path), name)) as new:
        _write_network(new, network, config, params, dtype)
        _write_unmapped(new, unmapped)


def read_unmapped(folder: Path) -> Unmapped:
    """What `write_folder` or `write_network` wrote into a folder as `unmapped`; of another folder nothing.

    Raises:
        ValueError: where the file is damaged.
    """
    if not (file := folder / UNMAPPED).is_file():
        return Unmapped({}, {})
    return Unmapped(open_safetensors(file), read_metadata(file))


def _write_unmapped(folder: Path, unmapped: Unmapped | None) -> None:
    if unmapped is not None and unmapped.tensors:
        tensors = {name: Stored(array, array.dtype, checked=False) for name, array in unmapped.tensors.items()}
        write_safetensors(folder / UNMAPPED, tensors, unmapped.metadata)


CLIP = Path(__file__).parents[1] / "assets" / "clip"
"""The folder of the tokenizer that all of Stable Diffusion 1, 2 and XL have."""
_CLIP_TOKENS = 49_408
# A file that a part's folder holds, whatever the folder is called.
_OWN_FILES = {name: ("config.json",) for name in NETWORKS}
_OWN_FILES |= {"scheduler": ("scheduler_config.json",)}
_OWN_FILES |= dict.fromkeys(TOKENIZERS.values(), ("tokenizer.json", "vocab.json", "bpe_simple_vocab_16e6.txt.gz"))


def find_part(path: Path | str, name: str) -> Path:
    """The folder of one part, such as "unet", "text_encoder_2", "scheduler" or "tokenizer"; or the file that it is in.

    Args:
        path: a model's folder, a run directory that has exported a model, the part's own folder, or a single file,
            whose tokenizer is CLIP's, which comes with the package.
        name: the part.

    Raises:
        ValueError: where it is none of these, or the folder of another part; for the tokenizer of a single file whose
            text encoder has another vocabulary than CLIP's.
    """
    path = Path(path)
    if is_single(path):
        return clip_tokenizer(open_single(path)) if name in TOKENIZERS.values() else path
    for folder in (path / name, path / "export" / name):
        if folder.is_dir():
            return folder
    _check_exists(path)
    if not any((path / file).is_file() for file in _OWN_FILES[name]):
        raise ValueError(f"{path} has no folder {name!r}; it is not a diffusers model folder, or only half of one, nor "
                         "the folder of such a part.")  # fmt: skip
    if name in NETWORKS:
        values = load_json(path / "config.json")
        if "task" in values:
            raise ValueError(f"{path} is a run that has exported no {name}; train on to its first evaluation.")
        if (cls := values.get("_class_name", NETWORKS[name].cls)) != NETWORKS[name].cls:
            raise ValueError(
                f"{path} is the folder of {cls!r}, and the class of a {name} is {NETWORKS[name].cls}; name its folder."
            )
    return path


def has_part(path: Path | str, name: str) -> bool:
    """Whether a model's folder, a run directory that has exported one, or a single file has a network of this name."""
    path = Path(path)
    if is_single(path):
        return name in open_single(path).places
    return (path / name).is_dir() or (path / "export" / name).is_dir()


FORCE_ZEROS = "force_zeros_for_empty_prompt"
"""In the index of Stable Diffusion XL's models, whether an empty negative prompt is zeros."""


def zero_empty(path: Path | str) -> bool:
    """Whether Stable Diffusion XL in a folder, run directory or single file takes zeros for an empty negative prompt.

    Raises:
        ValueError: where its index cannot be read.
    """
    if is_single(path):
        return open_single(path).zero_empty
    index = next(
        (file for folder in ("", "export") if (file := Path(path) / folder / "model_index.json").exists()), None
    )
    return index is None or bool(load_json(index).get(FORCE_ZEROS, True))


def check_latents(vae: Path) -> None:
    """Refuses an autoencoder, in this folder, whose latents have a mean and a scale for each channel.

    Raises:
        ValueError: for such a config.
    """
    file = vae / "config.json"
    values = load_json(file)
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if values.get(name):
            raise ValueError(f"{file}: {name} is {values[name]}; supported: null.")


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise ValueError(
            f"{path} is not a folder or file that exists, and so not a diffusers model folder; give the path of one, "
            "of a run directory or of a single file."
        )


def clip_tokenizer(file: SingleFile) -> Path:
    """The folder of CLIP's tokenizer, for a model in a single file, which does not hold its own.

    Raises:
        ValueError: where the text encoder has another vocabulary.
    """
    name = "text_encoder" if "text_encoder" in file.places else "text_encoder_2"
    if (tokens := file.config(name).vocab_size) != _CLIP_TOKENS:
        raise ValueError(
            f"{file.path} has a text encoder of {tokens} tokens, where CLIP's has {_CLIP_TOKENS}, and a single file "
            "does not hold its tokenizer; name a folder with vocab.json and merges.txt, or a diffusers folder that "
            "has one: tokenizer= in Python, --tokenizer in the shell, --task.tokenizer for train.py. Commands that "
            "lack it take the folder that jaxdiff.tools.convert makes."
        )
    return CLIP


def model_schedule(path: Path | str) -> SchedulerConfig:
    """The noise schedule of a model: a folder, a run directory that has exported one, or a single file.

    Raises:
        ValueError: as `find_part`, `read_scheduler` and `open_single` do.
    """
    if is_single(path):
        return open_single(path).scheduler
    return read_scheduler(find_part(path, "scheduler").parent)


def tokenizer_folder(path: Path | str, name: str = "tokenizer") -> Path:
    """The folder of a model's tokenizer, or of its `tokenizer_2`.

    Raises:
        ValueError: where it is not there, or lacks a file.
    """
    return _check_tokenizer(find_part(path, name))


def _check_tokenizer(folder: Path) -> Path:
    if not (folder / "tokenizer.json").exists():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).exists():
                raise ValueError(
                    f"{folder} has neither tokenizer.json nor {name}; the tokenizer is incomplete, or gone."
                )
    return folder


def _write_network(
    folder: Path, network: _Network, config: NetworkConfig, params: Params, dtype: DTypeLike | None
) -> None:
    tensors = stored(torch_views(params), dtype)
    values = to_dict(config)
    if isinstance(config, UNetConfig):  # diffusers reads heads from `attention_head_dim` only
        values |= {"attention_head_dim": list(config.heads), "num_attention_heads": None}
    if network.library != "transformers":
        values = {"_class_name": network.cls} | _VERSION | MARK | values
    else:
        kinds = Counter(one.dtype.name for one in tensors.values())
        most = kinds.most_common(1)[0][0]
        kind = "clip_vision_model" if isinstance(config, CLIPVisionConfig) else "clip_text_model"
        values |= {"architectures": [network.cls], "model_type": kind, "dtype": most} | MARK
    _write_json(folder / "config.json", values)
    write_safetensors(folder / f"{network.stem}.safetensors", tensors, {"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_target(path: Path | str, name: str | None = None) -> None:
    """Refuses, before the work, what `write_folder` or, of one network, `write_network` would refuse after it.

    Raises:
        ValueError: where there is a file, or a folder with what is not ours to replace.
    """
    _check_replaceable(*_target(Path(path), name))


def _target(path: Path, name: str | None = None) -> tuple[Path, str, set[str]]:
    """Where a model, or one network of it, is written, and what may be there; the arguments of `replaced`."""
    if name is None:
        folders = {*NETWORKS, "scheduler", *NOISINGS, PROCESSOR, *TOKENIZERS.values()}
        return path.absolute(), "model_index.json", {*folders, UNMAPPED}
    return path.absolute() / name, "config.json", {f"{NETWORKS[name].stem}.safetensors", UNMAPPED}


def _check_replaceable(path: Path, marked: str, others: set[str]) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; choose a folder that is new or empty.")
    if path.exists() and (there := {p.name for p in path.iterdir()}):
        ours = marked in there and MARK.items() <= load_json(path / marked).items()
        if not ours or there - others - {marked}:
            raise ValueError(f"{path} holds files that are not ours to replace; choose a folder that is new or empty.")


@contextmanager
def replaced(path: Path, marked: str, others: set[str]) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `path` at the end, or vanishes when the filling fails.

    Args:
        path: a new or empty folder, or an older one of ours.
        marked: a JSON file with `MARK`, which says that a folder is ours.
        others: what else may be in a folder that gives way.

    Raises:
        ValueError: where the folder holds anything else, or cannot be written.
    """
    path = path.absolute()
    _check_replaceable(path, marked, others)
    new, old = (path.with_name(f".{path.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    try:
        for left in path.parent.glob(".*") if path.exists() else ():  # by writers that were killed
            ours = left.name.startswith((f".{path.name}.new-", f".{path.name}.old-"))
            if ours and left.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        if old.exists() and not path.exists():  # stopped between the two, perhaps by the user
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
