"""A model in memory: its networks by role, and what belongs to them. Loading and saving; nothing is drawn here."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdiff import build
from jaxdiff.build import NetworkConfig
from jaxdiff.config import SchedulerConfig, VAEConfig, load_json, naming
from jaxdiff.data.tokens import Tokenizer, declared_length
from jaxdiff.families import FAMILIES, Family, StableDiffusion, StableDiffusionXL, StableDiffusionXLRefiner, family_of
from jaxdiff.io.control import ControlNet, read_control
from jaxdiff.io.convert import leaves
from jaxdiff.io.embeddings import HOW, Embedding, Vectors, read_embedding, with_rows
from jaxdiff.io.folder import (
    DEFAULTS,
    FORCE_ZEROS,
    NOISINGS,
    PROCESSOR,
    TOKENIZERS,
    Part,
    Unmapped,
    check_latents,
    clip_tokenizer,
    find_part,
    networks_of,
    read_index,
    read_network,
    tokenizer_folder,
    write_folder,
)
from jaxdiff.io.image_encoder import NAME as ENCODER
from jaxdiff.io.image_encoder import ImageEncoder, processor_values, read_image_encoder, read_processor
from jaxdiff.io.ip_adapter import NAME as IP_ADAPTER
from jaxdiff.io.ip_adapter import IPAdapter, encoder_beside, read_ip_adapter
from jaxdiff.io.lora import LoRA, merge_loras
from jaxdiff.io.mapped import check_unchanged
from jaxdiff.io.preview import NAME as TINY
from jaxdiff.io.preview import TinyVAE, read_tiny_vae
from jaxdiff.io.scheduler import noising_values, read_noising, read_sampler, read_scheduler
from jaxdiff.io.single_file import SingleFile, is_single, open_single
from jaxdiff.io.weights import check_params
from jaxdiff.runtime.programs import remembered
from jaxdiff.types import Params

logger = logging.getLogger(__name__)
EMBEDDED = Path(__file__).parent / "assets" / "emoji"
UPSCALER = "StableDiffusionUpscalePipeline"
"""The class in diffusers that draws with Stable Diffusion whose denoiser enlarges images."""
DTYPES = ("float32", "bfloat16")

# From the params by role to others. LoRAs have a way of their own, `Model.with_loras`.
Adapter = Callable[[dict[str, Params]], dict[str, Params]]


@dataclass(frozen=True)
class FileOptions:
    """What a single file does not say, and which of its weights are taken."""

    tokenizer: Path | None = None
    """For a model in a single file, in CLIP's place: a folder with vocab.json and merges.txt, or a diffusers folder."""
    prediction_type: str | None = None
    """For a model in a single file, which does not say it: epsilon or v_prediction."""
    ema: bool = False
    """Of a model in a single file, take the averaged weights of the denoiser."""


class Network(NamedTuple):
    """A network's config and its params."""

    config: NetworkConfig
    params: Params


@dataclass(frozen=True)
class Model:
    """A text-to-image model."""

    networks: Mapping[str, Network]
    """By role: "denoiser", "vae" and "text_encoder"; of Stable Diffusion XL "text_encoder_2", too."""
    scheduler: SchedulerConfig
    """The noise schedule that it was trained with."""
    tokenizer: Tokenizer | None
    """The first text encoder's, where there is any."""
    family: type[Family] = FAMILIES[0]
    """How the networks are called."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it is sampled with where a user gives none."""
    name: str = ""
    loras: tuple[LoRA, ...] = ()
    """Those that the params have in them."""
    embeddings: tuple[Embedding, ...] = ()
    """Textual inversions that the tokenizer and the params have in them."""

    controls: tuple[ControlNet, ...] = ()
    """Networks that images steer the denoiser by."""
    ip_adapters: tuple[IPAdapter, ...] = ()
    """Networks that make images prompts."""
    image_encoder: ImageEncoder | None = None
    """What they read images by, or the model itself does."""
    noising: SchedulerConfig | None = None
    """The noise schedule of an image that the denoiser reads."""
    preview: TinyVAE | None = None
    """A tiny autoencoder for previews."""
    tokenizer_2: Tokenizer | None = None
    """The second text encoder's."""
    exchanged: Mapping[str, str] = field(default_factory=dict)
    """The networks, by role, that were taken from another file or folder, and its name."""
    zero_empty: bool = False
    """Whether an empty negative prompt is zeros, and not what the text encoders make of it."""

    def __post_init__(self) -> None:
        for role, tokenizer in zip(self.family.TEXT_ENCODERS, self.tokenizers, strict=True):
            vocabulary = self.configs[role].vocab_size
            if len(tokenizer) > vocabulary:
                told = "text encoder" if role == "text_encoder" else role
                raise ValueError(
                    f"The tokenizer has {len(tokenizer)} tokens, more than the {told}'s vocab_size {vocabulary}."
                )
        if len({tokenizer.max_length for tokenizer in self.tokenizers}) > 1:
            raise ValueError("The text encoders' tokenizers take texts of different lengths; they must take the same.")

    @cached_property
    def configs(self) -> dict[str, Any]:
        """The networks' configs, by role."""
        return {role: network.config for role, network in self.networks.items()}

    @cached_property
    def params(self) -> dict[str, Params]:
        """The networks' params, by role, as they were read."""
        return {role: network.params for role, network in self.networks.items()}

    @property
    def tokenizers(self) -> tuple[Tokenizer, ...]:
        """Each text encoder's, in the order of the family's `TEXT_ENCODERS`."""
        return tuple(one for one in (self.tokenizer, self.tokenizer_2) if one is not None)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels that the model was trained at; None where its config does not say."""
        return self.family.trained_size(self.configs)

    def modules(self, dtype: DTypeLike = jnp.float32) -> Family:
        """The networks as functions that compute in `dtype`.

        Raises:
            ValueError: where the networks do not fit together.
        """
        return self.family.of(self.configs, dtype)

    def with_params(self, params: Mapping[str, Params]) -> "Model":
        """The same model with other params, by role."""
        networks = {role: Network(network.config, params[role]) for role, network in self.networks.items()}
        return replace(self, networks=networks)

    def with_network(self, role: str, path: str | Path, prediction_type: str | None = None) -> "Model":
        """The same model with another's network in place of its own, such as a VAE that was trained further.

        Args:
            role: "denoiser" or "vae".
            path: a diffusers folder, or a single file that has the network.
            prediction_type: what the denoiser predicts; None is what the folder or the file says, else as the model's
                own.

        Raises:
            ValueError: where it has none, is damaged, or does not fit the others.
        """
        name = self.family.FOLDERS[role]
        config, params = read_network(path, name)
        own, scheduler = self.networks[role].config, self.scheduler
        if isinstance(config, VAEConfig) and isinstance(own, VAEConfig):
            if config.factor != own.factor:
                raise ValueError(f"{path} has {config.factor} pixels to each latent, and the model's own autoencoder "
                                 f"{own.factor}; give one of {own.factor}.")  # fmt: skip
            # The latents that the denoiser knows are those of the model's own scale.
            config = replace(config, scaling_factor=own.scaling_factor, sample_size=own.sample_size)
        elif role == "denoiser" and (found := prediction_type or _prediction_of(Path(path))):
            if found != scheduler.prediction_type and prediction_type is None:
                logger.warning("%s: its denoiser predicts %s, and is taken so, where the model's own predicts %s.",
                               path, found, scheduler.prediction_type)  # fmt: skip
            scheduler = replace(scheduler, prediction_type=found)
        network = Network(config, check_network(name, config, params, path))
        model = replace(
            self,
            networks={**self.networks, role: network},
            scheduler=scheduler,
            exchanged={**self.exchanged, role: Path(path).resolve().name},
        )
        with naming(path):
            model.modules()
        return model

    def with_loras(self, loras: Iterable[Any]) -> "Model":
        """The same model with LoRAs merged in; what they change is computed when it is placed or saved.

        Args:
            loras: files, or pairs of a file and a strength; their order is of no matter.

        Raises:
            ValueError: where a file is damaged, for another model, or changes nothing.
        """
        wanted = tuple(LoRA.of(lora) for lora in loras)
        folders = self.family.FOLDERS
        merged = merge_loras({folders[role]: params for role, params in self.params.items()}, wanted)
        model = self.with_params({role: merged[folders[role]] for role in self.params})
        return replace(model, loras=(*self.loras, *wanted))

    def with_embeddings(self, embeddings: Iterable[Any]) -> "Model":
        """The same model with further words, which textual inversions teach it.

        Args:
            embeddings: files, or pairs of a file and what its word is called in prompts.

        Raises:
            ValueError: where a file is damaged or for another model, or a word is there already.
        """
        wanted = tuple(Embedding.of(embedding) for embedding in embeddings)
        folders = {role: self.family.FOLDERS[role] for role in self.family.TEXT_ENCODERS}
        widths = {folder: self.configs[role].hidden_size for role, folder in folders.items()}
        words: dict[str, Vectors] = {}
        for embedding in wanted:
            for word, vectors in read_embedding(embedding, widths).items():
                if word in words:
                    raise ValueError(f"{embedding.path} teaches the word {word!r}, and so does another file; give it "
                                     f"another name{HOW}.")  # fmt: skip
                words[word] = vectors
        networks, tokenizers = dict(self.networks), []
        for (role, folder), own in zip(folders.items(), self.tokenizers, strict=True):
            try:
                tokenizer = own.with_words({word: len(vectors[folder]) for word, vectors in words.items()})
            except ValueError as error:
                raise ValueError(f"{str(error).removesuffix('.')}{HOW}.") from error
            config: Any = networks[role].config
            params = networks[role].params
            if words:
                numbers = np.array([i for word in words for i in tokenizer.words[word]])
                params = with_rows(params, numbers, np.concatenate([vectors[folder] for vectors in words.values()]))
            # Where the config says which the end token is, it is no more the one with the largest number.
            config = replace(config, vocab_size=max(config.vocab_size, len(tokenizer)), eos_token_id=tokenizer.eos_id)
            networks[role] = Network(config, params)
            tokenizers.append(tokenizer)
        changed = dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False))
        return replace(self, networks=networks, **changed, embeddings=(*self.embeddings, *wanted))

    def with_controls(self, controls: Iterable[Any]) -> "Model":
        """The same model with control networks beside it, which are not saved with it.

        Args:
            controls: folders or files of ControlNets and T2I-Adapters.

        Raises:
            ValueError: where one is damaged or for another model.
        """
        family, found = self.modules(), []
        for path in controls:
            if not isinstance(path, str | Path):
                raise ValueError(f"A control network is {path!r}; give its folder or file.")
            control = read_control(path)
            with naming(control.path):
                family.control_net(control.config)
            found.append(
                control._replace(params=check_network(control.name, control.config, control.params, control.path))
            )
        return replace(self, controls=(*self.controls, *found))

    def with_ip_adapters(self, adapters: Iterable[Any], image_encoder: str | Path | None = None) -> "Model":
        """The same model with IP-Adapters beside it, which are not saved with it.

        Args:
            adapters: their files.
            image_encoder: the folder of the image encoder of all of them; None is what the model has already, or the
                folder `image_encoder` beside the first of them.

        Raises:
            ValueError: where one is damaged or for another model, or there is no image encoder.
        """
        wanted = tuple(adapters)
        for path in wanted:
            if not isinstance(path, str | Path):
                raise ValueError(f"An IP-Adapter is {path!r}; give its file.")
        if self.family.IMAGE_READERS:
            raise ValueError("The model reads an image anyway (image_prompt); leave out IP-Adapters.")
        found = [read_ip_adapter(path) for path in wanted]
        if not found:
            raise ValueError("image_encoder is for IP-Adapters; give one (ip_adapters=, --ip-adapter), or leave "
                             "image_encoder out.")  # fmt: skip
        encoder = self.image_encoder
        if image_encoder is not None or encoder is None:
            folder = encoder_beside(found[0].path) if image_encoder is None else image_encoder
            if folder is None:
                raise ValueError(
                    f"{found[0].path} has no folder {ENCODER!r} beside it, by which IP-Adapters read images; give one "
                    "by image_encoder= (--image-encoder)."
                )
            encoder = read_image_encoder(folder)
            encoder = encoder._replace(params=check_network(ENCODER, encoder.config, encoder.params, encoder.path))
        family, own = self.modules(), []
        for adapter in (*self.ip_adapters, *found):
            with naming(adapter.path):
                family.ip_adapter(adapter.config, encoder.config)
            own.append(adapter._replace(params=check_network(IP_ADAPTER, adapter.config, adapter.params, adapter.path)))
        return replace(self, ip_adapters=tuple(own), image_encoder=encoder)

    def with_preview(self, path: str | Path) -> "Model":
        """The same model with a tiny autoencoder beside it, the folder of a TAESD, which is not saved with it.

        Raises:
            ValueError: where it is damaged or for another model.
        """
        tiny = read_tiny_vae(path)
        with naming(tiny.path):
            self.modules().preview_net(tiny.config)
        return replace(self, preview=tiny._replace(params=check_network(TINY, tiny.config, tiny.params, tiny.path)))

    def save(self, path: str | Path, dtype: DTypeLike = np.float32) -> None:
        """Writes a folder that `load` and diffusers read.

        Args:
            path: a new or empty folder, or one that this method wrote.
            dtype: float32, float16 or bfloat16, the type of the stored weights.

        Raises:
            ValueError: when the folder holds anything that is not ours to replace, or cannot be written, for
                another `dtype`, or where a file that params are mapped from was written to.
        """
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise ValueError(f"dtype is {dtype!r}; choose float32, float16 or bfloat16.") from None
        self.write(path, dtype)

    def write(self, path: str | Path, dtype: DTypeLike | None = None, unmapped: Unmapped | None = None) -> None:
        """As `save`; without a type weights keep their own, and what a single file had beside them goes along."""
        for leaf in jax.tree.leaves(self.params):
            check_unchanged(leaf)
        named = self.networks.items()
        networks: Any = {self.family.FOLDERS[role]: (config, params) for role, (config, params) in named}
        write_folder(
            path, networks, self.scheduler, self.tokenizer, self.defaults, dtype, unmapped, self.tokenizer_2,
            self.about, self.parts,
        )  # fmt: skip

    @property
    def about(self) -> dict[str, Any]:
        """What `model_index.json` says of it, beside its parts."""
        about: dict[str, Any] = {"_class_name": self.family.PIPELINE}
        if self.noising is not None and not self.family.IMAGE_READERS:
            about["_class_name"] = UPSCALER
        if issubclass(self.family, StableDiffusionXLRefiner):
            about[FORCE_ZEROS] = self.zero_empty
        if self.family is StableDiffusionXLRefiner:
            about["requires_aesthetics_score"] = True
        return about

    @property
    def parts(self) -> dict[str, Part]:
        """Folders of one JSON file that belong to it, beside its networks."""
        parts = {}
        if self.noising is not None:
            name = NOISINGS[0 if self.family.IMAGE_READERS else 1]
            values = noising_values(self.noising)
            parts[name] = Part("diffusers", values["_class_name"], "scheduler_config.json", values)
        if self.family.IMAGE_READERS and self.image_encoder is not None:
            values = processor_values(self.image_encoder.processor)
            parts[PROCESSOR] = Part("transformers", values["image_processor_type"], "preprocessor_config.json", values)
        return parts


def read_model(
    path: str | Path | None = None, variant: str | None = None, options: FileOptions = FileOptions()
) -> Model:
    """Reads a model; weights keep the type they are stored in.

    Args:
        path: a diffusers folder, a run directory of `train.py`, or a file in the original layout of Stable Diffusion;
            None is the model that comes with the package.
        variant: "fp16" and the like, for folders with several sets of weights.
        options: for a single file.

    Raises:
        ValueError: in one sentence, when anything is missing, damaged or not supported.
    """
    path = EMBEDDED if path is None else Path(path)
    if is_single(path):
        return _read_file(path, options)
    if options != FileOptions():
        raise ValueError(f"{path} is no single file; tokenizer, prediction_type and ema are for those alone.")
    folder = exported(path)
    index = read_index(folder)
    family = family_of(networks_of(index)) or StableDiffusion
    for name, supported in {"is_cosxl_edit": (False,), FORCE_ZEROS: (False, True)}.items():
        if not any(index.get(name, False) is value for value in supported):
            told = " or ".join(map(json.dumps, supported))
            raise ValueError(f"{folder / 'model_index.json'}: {name} is {index[name]!r}; supported: {told}.")
    networks = {role: Network(*read_network(folder, name, variant)) for role, name in family.FOLDERS.items()}
    for role, (config, params) in networks.items():
        name = family.FOLDERS[role]
        networks[role] = Network(config, check_network(name, config, params, folder / name))
    if family is not StableDiffusion:
        check_latents(folder / "vae")
    texts: list[Any] = [networks[role].config for role in family.TEXT_ENCODERS]
    encoder = None
    if ENCODER in networks:
        config: Any = networks[ENCODER].config
        place = folder / ENCODER
        encoder = ImageEncoder(place, config, networks[ENCODER].params, read_processor(place, config))
    noisings = [name for name in NOISINGS if index.get(name) not in (None, [None, None])]
    folders = [tokenizer_folder(folder, TOKENIZERS[family.FOLDERS[role]]) for role in family.TEXT_ENCODERS]
    tokenizers = [
        Tokenizer.load(own, declared_length(own, text.max_position_embeddings))
        for own, text in zip(folders, texts, strict=True)
    ]
    return Model(
        networks=networks,
        scheduler=read_scheduler(folder),
        tokenizer=tokenizers[0] if tokenizers else None,
        tokenizer_2=tokenizers[1] if tokenizers[1:] else None,
        image_encoder=encoder,
        noising=read_noising(folder / noisings[0]) if noisings else None,
        zero_empty=bool(index.get(FORCE_ZEROS, family is StableDiffusionXL)),
        family=family,
        defaults=read_sampler(folder) | index.get(DEFAULTS, {}),
        name=path.resolve().name,
    )


def _read_file(path: Path, options: FileOptions) -> Model:
    """The model in a single file."""
    file = open_single(path, options.prediction_type, options.ema)
    family = family_of(set(file.places)) or StableDiffusion
    if missing := [name for name in family.FOLDERS.values() if name not in file.places]:
        raise ValueError(f"{path} is {file.seems}; a model to draw with has a {' and a '.join(missing)}, too.")
    tokenizers = file_tokenizers(file, options.tokenizer)
    file.warn_of_unknown()
    networks = {}
    for role, name in family.FOLDERS.items():
        config, params = file.network(name)
        networks[role] = Network(config, check_network(name, config, params, f"{path} ({name})"))
    return Model(
        networks=networks,
        scheduler=file.scheduler,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if tokenizers[1:] else None,
        zero_empty=file.zero_empty,
        family=family,
        defaults=file.defaults,
        name=path.resolve().name,
    )


def file_tokenizers(file: SingleFile, path: Path | None) -> tuple[Tokenizer, ...]:
    """The text encoders' tokenizers of a model in a single file: CLIP's, or that of a folder, its own or another's.

    Raises:
        ValueError: where `path` is no such folder; where it is None and the vocabulary is not CLIP's.
    """
    folder = clip_tokenizer(file) if path is None else find_part(path, "tokenizer")
    lengths = {name: file.config(name).max_position_embeddings for name in file.pads}
    return tuple(
        Tokenizer.load(folder, declared_length(folder, lengths[name])).padded_with(pad)
        for name, pad in file.pads.items()
    )


def check_network(name: str, config: NetworkConfig, params: Params, where: str | Path) -> Params:
    """The params that a network of this config has, once they are known to fit; it is named by its folder.

    Raises:
        ValueError: as `check_params` does.
    """
    return check_params(params, _expected(name, config), where)


def merge_adapters(params: dict[str, Params], adapters: Sequence[Adapter] = ()) -> dict[str, Params]:
    """The params by role after each adapter, in order."""
    for adapter in adapters:
        params = adapter(params)
    return params


def check_dtype(dtype: str | None) -> str:
    """The type that networks compute in; None is float32 on CPUs, else bfloat16.

    Raises:
        ValueError: for another one.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}.")
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _prediction_of(path: Path) -> str | None:
    """What a folder or a file says that its denoiser predicts; None where it does not."""
    if is_single(path):
        return open_single(path).told_prediction
    folder = exported(path)
    return read_scheduler(folder).prediction_type if (folder / "scheduler").is_dir() else None


def exported(path: Path) -> Path:
    """The diffusers folder that `path` is, or that the run directory `path` has exported.

    Raises:
        ValueError: where a run has exported none yet, or no more than an autoencoder.
    """
    if (path / "model_index.json").exists() or not _is_run(path):
        return path
    folder = path / "export"
    if not folder.exists():
        raise ValueError(f"{path} is a run that has not exported a model yet; train on to its first evaluation.")
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"{path} is a run that has exported no whole text-to-image model; train one with a DiffusionTask, until "
            "its first evaluation."
        )
    return folder


def _is_run(path: Path) -> bool:
    """Whether `train.py` made the folder."""
    if (path / "export").is_dir() or (path / "checkpoints").is_dir():
        return True
    return (path / "config.json").is_file() and "task" in load_json(path / "config.json")


@lru_cache(16)
def _expected(name: str, config: NetworkConfig) -> Params:
    """The shapes of a network's params. To find them takes as long as to trace it, so they are kept as well."""

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
