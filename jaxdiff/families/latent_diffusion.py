"""What the families have in common whose denoiser is a UNet on an autoencoder's latents (Rombach et al. 2022).

A family is all that sampling needs to know of its networks: their roles, how prompts become a `Conditioning`, and how
the denoiser is called. Another family is another module with the same methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxdiff import build
from jaxdiff.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    IPAdapterConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from jaxdiff.models.clip_vision import CLIPVisionModelWithProjection
from jaxdiff.models.controlnet import ControlNetModel, embed, times
from jaxdiff.models.ip_adapter import IPAdapter
from jaxdiff.models.t2i_adapter import T2IAdapter
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.models.unet import (
    Added,
    UNet2DConditionModel,
    cross_attentions,
    perturbed,
    prompt_keys,
    structured,
    with_images,
)
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.types import Conditioning, Params, Tokens

Size = tuple[int, int]
Beside = Literal["mask", "image", "depth", "small image"]


@dataclass(frozen=True)
class LatentDiffusion(ABC):
    """The networks' modules, and functions of their params. Hashable, so that it can be static in `jax.jit`.

    Functions take the params of the networks that they call.
    """

    denoiser: UNet2DConditionModel
    vae: AutoencoderKL
    latent_scale: float
    """A latent times this has unit variance."""
    in_channels: int
    """Channels that the denoiser takes: a latent's, and what it reads beside it; see `beside`."""

    FOLDERS: ClassVar[Mapping[str, str]]
    """Each role's folder in a diffusers model folder."""
    TEXT_ENCODERS: ClassVar[tuple[str, ...]]
    """The roles of the networks that read prompts."""
    READS: ClassVar[frozenset[str]] = frozenset()
    """What requests say of images that the denoiser reads as numbers: see `sizes`."""
    IMAGE_READERS: ClassVar[tuple[str, ...]] = ()
    """The roles of the networks that read an image in a prompt's place, or beside it; see `read_image`."""
    PIPELINE: ClassVar[str]
    """The class in diffusers that draws with such a model."""

    @classmethod
    def of(cls, configs: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> Any:
        """The modules of these configs, by role, which compute in `dtype`.

        Raises:
            ValueError: where the networks do not fit together.
        """
        unet, vae = configs["denoiser"], configs["vae"]
        assert isinstance(unet, UNetConfig)
        assert isinstance(vae, VAEConfig)
        texts: list[CLIPTextConfig] = [configs[role] for role in cls.TEXT_ENCODERS]
        latent = vae.latent_channels
        kinds = (latent, 2 * latent + 1, 2 * latent, latent + 1) if unet.labels is None else (latent + 3,)
        if unet.out_channels != latent or unet.in_channels not in kinds:
            raise ValueError(
                f"The denoiser takes {unet.in_channels} channels and gives {unet.out_channels}, and the autoencoder's "
                f"latents have {latent}; it must give {latent}, and take {latent}, or {2 * latent + 1} for inpainting, "
                f"{2 * latent} to edit images, {latent + 1} with a depth map, {latent + 3} with labels of noise levels "
                "to enlarge images."
            )
        width, told = cls.context_width(configs)
        if unet.cross_attention_dim != width:
            raise ValueError(
                f"The denoiser's cross_attention_dim is {unet.cross_attention_dim} and the {told}; "
                f"{'it must be their sum' if len(texts) > 1 else 'they must be equal'}."
            )
        cls.check_added(unet, texts)
        return cls(
            denoiser=build.unet(unet, dtype),
            vae=build.vae(vae, dtype),
            latent_scale=vae.scaling_factor,
            in_channels=unet.in_channels,
            **{role: getattr(build, role)(configs[role], dtype) for role in (*cls.TEXT_ENCODERS, *cls.IMAGE_READERS)},
        )

    @classmethod
    def context_width(cls, configs: Mapping[str, Any]) -> tuple[int, str]:
        """Features of a token of the context, and a sentence's words for where they are from."""
        widths = [configs[role].hidden_size for role in cls.TEXT_ENCODERS]
        if len(widths) == 1:
            return widths[0], f"text encoder's hidden_size {widths[0]}"
        return sum(widths), f"text encoders' hidden_sizes {widths}"

    @classmethod
    @abstractmethod
    def check_added(cls, unet: UNetConfig, texts: Sequence[CLIPTextConfig]) -> None:
        """Whether the denoiser reads, beside time and context, what the family gives it.

        Raises:
            ValueError: where it does not.
        """

    @staticmethod
    def trained_size(configs: Mapping[str, Any]) -> Size | None:
        """Width and height in pixels that the model was trained at; None where its config does not say."""
        sides, factor = configs["denoiser"].sides, configs["vae"].factor
        return None if sides is None else (sides[1] * factor, sides[0] * factor)

    # Sizes ------------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels to a latent pixel, along each side."""
        return 2 ** (len(self.vae.channels) - 1)

    @property
    def grain(self) -> int:
        """Pixels of which each side should be a multiple, so that the denoiser halves it to whole numbers."""
        return self.factor * 2 ** (len(self.denoiser.channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.vae.latent_channels

    @property
    def decoder_channels(self) -> int:
        """Values to a pixel of the image in the decoder's largest features, which memory has to hold."""
        return sum(self.vae.channels[:2])

    @property
    @abstractmethod
    def text_layers(self) -> int:
        """Layers of the text encoder, of which clip_skip leaves out some."""

    @property
    def beside(self) -> Beside | None:
        """What the denoiser takes beside the noisy latent: a mask and the masked image's latent (9 channels), the
        latent of the image that it edits (8 channels), a depth map (5 channels), or the pixels of the image that it
        enlarges (7 channels)."""
        if self.denoiser.labels is not None:
            return "small image"
        more, latent = self.in_channels - self.latent_channels, self.latent_channels
        kinds: dict[int, Beside] = {latent + 1: "mask", latent: "image", 1: "depth"}
        return kinds.get(more)

    @property
    def context_features(self) -> int:
        """Features of a token of the context."""
        return sum(getattr(self, role).hidden_size for role in self.TEXT_ENCODERS)

    @property
    def needs_image(self) -> bool:
        """Whether nothing is drawn from a prompt alone."""
        return self.beside is not None or bool(self.IMAGE_READERS)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the denoiser reads the guidance scale, in place of being called twice."""
        return self.denoiser.guidance_features is not None

    # Prompts ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, params: Sequence[Params], tokens: Sequence[Tokens], clip_skip: int = 0) -> Conditioning:
        """Tokens to features, chunk after chunk: context [*n, chunks * length, d].

        A token with another weight than 1 moves on the line from the empty prompt's features at its place to its own.

        Args:
            params: the text encoders', in the order of `TEXT_ENCODERS`.
            tokens: as each of these reads them.
            clip_skip: layers that are left out, from the last, below `text_layers`.
        """

    def numbers(
        self,
        size: Size,
        original_size: Size,
        crop: tuple[int, int],
        aesthetic_score: float,
        guidance: float,
        noise_level: int = 0,
    ) -> Float32[np.ndarray, "2 k"] | None:
        """`Conditioning.extra` of a negative prompt and of a prompt; None where the denoiser reads no numbers.

        Args:
            size: width and height in pixels of the image that is drawn.
            original_size: those of the image that it is to look like, before it was cut and resized.
            crop: the left and top edge at which it is to look cut, in pixels.
            aesthetic_score: how well people are to like it, about 0 to 10.
            guidance: the guidance scale.
            noise_level: of the image that is enlarged.
        """
        if self.denoiser.labels is not None:
            return np.full((2, 1), noise_level, np.float32)
        numbers = self.sizes(size, original_size, crop, aesthetic_score)
        if not self.embeds_guidance:
            return numbers
        scale = np.full((2, 1), guidance, np.float32)
        return scale if numbers is None else np.concatenate([numbers, scale], axis=1)

    def sizes(
        self, size: Size, original_size: Size, crop: tuple[int, int], aesthetic_score: float
    ) -> Float32[np.ndarray, "2 k"] | None:
        """Of `numbers`, those that say what images are to look like."""
        return None

    # Images that the denoiser reads -----------------------------------------------------------------------------------

    def image_noise(self, shape: tuple[int, int, int]) -> tuple[int, ...] | None:
        """The shape of the noise for the image that the denoiser reads, beside latents of this shape; None without."""
        return (*shape[:2], 3) if self.beside == "small image" else None

    def read_image(
        self,
        params: Sequence[Params],
        pixels: Float[Array, "b s s 3"],
        noise: Float[Array, "b d"] | None,
        level: Float[Array, ""],
        alpha_bar: Float[Array, ""],
    ) -> Float[Array, "b d2"]:
        """What `with_image` is to put into a conditioning.

        Args:
            params: those of `IMAGE_READERS`.
            pixels: images as the image encoder reads them.
            noise: of the shape `image_noise`.
            level: how much noise there is to be, as a training step.
            alpha_bar: the share of the image in the variance there.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no images.")

    def with_image(self, conditioning: Conditioning, vectors: Float[Array, "b d"]) -> Conditioning:
        """The conditioning [b, phases, prompts, ...], with what `read_image` gave."""
        raise NotImplementedError(f"{type(self).__name__} reads no images.")

    # Denoiser ---------------------------------------------------------------------------------------------------------

    def prepare(self, params: Params, conditioning: Conditioning) -> Params:
        """What the denoiser computes from the prompts alone, once for all steps: cross-attention's keys and values."""
        return prompt_keys(params, conditioning.context, self.denoiser.dtype)

    def beside_prompts(self, prepared: Params, images: Any) -> Params:
        """What `prepare` gave, and images beside the prompts: what `image_prompts` gave, in the same rows."""
        return with_images(prepared, self.denoiser, images)

    def predict(
        self,
        params: Params,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        conditioning: Conditioning,
        prepared: Params,
        edits: Params | None = None,
        deep: Float[Array, "n h2 w2 d"] | None = None,
        only_deep: bool = False,
        added: Added | None = None,
    ) -> Array:
        """The denoiser's output [n, h, w, c] for n rows, each with its own prompt.

        Args:
            params: the denoiser's.
            x: noisy latents at unit variance, and after them an inpainting model's further channels.
            t: the training steps.
            conditioning: n rows of it.
            prepared: n rows of what `prepare` gave.
            edits: merged results of `perturbed_attention` and `shared_layout`; None leaves attention as it is.
            deep: features of an earlier step, which stand in for most of the network (Ma et al. 2023, DeepCache).
            only_deep: returns those features.
            added: what control networks add (`control`), of n rows.
        """
        variables = {"params": params, "prompt": prepared} | ({} if edits is None else {"rows": edits})
        return self.denoiser.apply(  # pyright: ignore[reportReturnType]
            variables, x, t, conditioning.context, deep, added, **self._told(conditioning), only_deep=only_deep
        )

    def _told(self, conditioning: Conditioning) -> dict[str, Any]:
        """What UNets are told beside the prompt's features."""
        numbers, guidance = conditioning.extra, None
        if self.embeds_guidance:
            assert numbers is not None, "this denoiser reads the guidance scale"
            numbers, guidance = numbers[:, :-1], numbers[:, -1]
        return {"pooled": conditioning.pooled, "numbers": numbers, "guidance": guidance}

    def perturbed_attention(self, params: Params, rows: Bool[Array, " n"]) -> Params:
        """The edit in which these rows' self-attention in the middle is the identity (Ahn et al. 2024, PAG)."""
        return perturbed(params, rows)

    def shared_layout(self, params: Params, source: Int[Array, " n"]) -> Params:
        """The edit in which row i takes its layout from row source[i] (Tumanyan et al. 2023, plug-and-play)."""
        return structured(params, source)

    # Control ----------------------------------------------------------------------------------------------------------

    def control_net(self, config: ControlNetConfig | T2IAdapterConfig, dtype: DTypeLike = jnp.float32) -> Any:
        """The module of a network that an image steers the denoiser by.

        Raises:
            ValueError: where its features do not fit the denoiser's.
        """
        if isinstance(config, T2IAdapterConfig):
            adapter = build.t2i_adapter(config, dtype)
            if adapter.sizes not in (wanted := self._stages, wanted[:-1]):
                raise ValueError(
                    f"It is for another model: its features have channels, and pixels to a side, {adapter.sizes}, and "
                    f"this model's {wanted[:-1]}."
                )
            return adapter
        net, own = build.controlnet(config, dtype), self.denoiser
        sizes = {
            "block_out_channels": (net.channels, own.channels),
            "layers_per_block": (net.layers, own.layers),
            "in_channels": (config.in_channels, self.latent_channels),
            "cross_attention_dim": (config.cross_attention_dim, self.context_features),
            "pixels to a latent pixel": (config.factor, self.factor),
        }
        if other := {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}:
            told = ", ".join(
                f"its {name} is {theirs}, and this model's {ours}" for name, (theirs, ours) in other.items()
            )
            raise ValueError(f"It is for another model: {told}.")
        return net

    @property
    def _stages(self) -> list[tuple[int, int]]:
        """Channels and pixels to a side of what T2I-Adapters add to: each stage's features, and the middle's."""
        net, found = self.denoiser, []
        for i, (channels, depth) in enumerate(zip(net.channels, net.down_depths, strict=True)):
            halved = not depth and i < len(net.channels) - 1
            found.append((channels, self.factor * 2 ** (i + halved)))
        return [*found, (net.channels[-1], self.factor * 2 ** (len(net.channels) - 1))]

    def check_control(self, net: Any, size: Size, tile: bool) -> None:
        """Whether a network can steer an image of this width and height, as a whole or in tiles.

        Raises:
            ValueError: where not.
        """
        if not isinstance(net, T2IAdapter):
            return
        if size[0] % net.factor or size[1] % net.factor:
            raise ValueError(f"size is {size[0]}x{size[1]}; for this T2I-Adapter both sides must be multiples of "
                             f"{net.factor}.")  # fmt: skip
        if tile:
            raise ValueError("A T2I-Adapter's features cannot be cut into tiles; leave out tile or control_image.")

    def steers_prompt_alone(self, net: Any) -> bool:
        """Whether a network is for the rows of the prompt alone, and not for those of the negative prompt."""
        return isinstance(net, ControlNetModel) and net.pools

    def embed_control(self, net: Any, params: Params, image: Float[Array, "b h2 w2 3"]) -> Any:
        """What a network makes of images in [0, 1], once for all steps: features [b, h, w, d] of the latent's size, or
        several of other sizes."""
        return net.apply({"params": params}, image) if isinstance(net, T2IAdapter) else embed(net, params, image)

    def control(
        self,
        net: Any,
        params: Params,
        x: Float[Array, "n h w c"],
        t: Float[Array, " n"],
        conditioning: Conditioning,
        prepared: Params,
        features: Any,
        scale: Float[Array, ""],
        guess: bool = False,
    ) -> Added:
        """What a network adds to the denoiser's features.

        Args:
            net: its module.
            params: its params.
            x: noisy latents at unit variance.
            t: the training steps.
            conditioning: n rows of it.
            prepared: n rows of what `prepare` gave for these params.
            features: n rows of what `embed_control` gave.
            scale: how much of it.
            guess: less of the features that come first, so that the image says what the prompt does not.
        """
        variables = {"params": params, "prompt": prepared}
        if isinstance(net, T2IAdapter):
            weighed_ = tuple(feature * scale.astype(feature.dtype) for feature in features)
            levels = len(self.denoiser.channels)
            return Added(middle=weighed_[levels] if weighed_[levels:] else None, stages=weighed_[:levels])
        told = self._told(conditioning)
        added: Any = net.apply(variables, x, t, conditioning.context, features=features, **told)
        return times(added, scale, guess and not net.pools)

    # Images as prompts ------------------------------------------------------------------------------------------------

    def image_encoder_net(
        self, config: CLIPVisionConfig, dtype: DTypeLike = jnp.float32
    ) -> CLIPVisionModelWithProjection:
        """The module of a network that reads images for `image_prompts`."""
        return build.image_encoder(config, dtype)

    def ip_adapter(self, config: IPAdapterConfig, encoder: CLIPVisionConfig, dtype: DTypeLike = jnp.float32) -> Any:
        """The module of an IP-Adapter.

        Raises:
            ValueError: where it is for another denoiser or another image encoder.
        """
        net = build.ip_adapter(config, dtype)
        channels, width = tuple(own for _, own in cross_attentions(self.denoiser)), self.context_features
        if config.cross_attention_dim != width or net.channels != channels:
            raise ValueError(
                f"It is for another model: its tokens have {config.cross_attention_dim} features, and it has "
                f"{len(net.channels)} layers of {_kinds(net.channels)} channels; this model's prompts have {width} and "
                f"its cross-attentions are {len(channels)}, of {_kinds(channels)}."
            )
        given = encoder.projection_dim if config.kind == "plain" else encoder.hidden_size
        if config.image_features != given:
            raise ValueError(
                f"It is for another image encoder: it reads {config.image_features} features, and this one gives "
                f"{given}; those for Stable Diffusion 1, and those with vit-h in their names, want CLIP's ViT-H, "
                "others of Stable Diffusion XL its ViT-bigG."
            )
        return net

    def image_prompts(
        self,
        encoder: CLIPVisionModelWithProjection,
        encoder_params: Params,
        adapters: Sequence[tuple[IPAdapter, Params]],
        pixels: Sequence[Float[Array, "b n s s 3"]],
        scales: Sequence[Float[Array, ""]],
    ) -> Any:
        """Keys and values of images, once for all steps, for `beside_prompts`.

        Args:
            encoder: what reads images.
            encoder_params: its params.
            adapters: IP-Adapters with their params.
            pixels: for each of them, the n images of each row as the encoder reads them.
            scales: how much each counts.

        Returns:
            For each cross-attention and each adapter keys and values [b, 2, n * tokens, c]: what stands beside a
            negative prompt, and beside a prompt.
        """

        def features(net: IPAdapter, images: Array) -> Array:
            found: Any = encoder.apply({"params": encoder_params}, images)
            return found.embedding if net.kind == "plain" else found.penultimate

        found = []
        for (net, params), images, scale in zip(adapters, pixels, scales, strict=True):
            b, n = images.shape[:2]
            own = features(net, images.reshape(b * n, *images.shape[2:]))
            # No image is an embedding of zeros, or what the encoder makes of zeros.
            none = jnp.zeros_like(own[:1]) if net.kind == "plain" else features(net, jnp.zeros_like(images[0, :1]))
            layers: Any = net.apply({"params": params}, jnp.concatenate([none, own]))

            def both(x: Array, b: int = b, n: int = n) -> Array:
                negative = jnp.broadcast_to(x[:1, None], (b, n, *x.shape[1:]))
                return jnp.stack([negative, x[1:].reshape(negative.shape)], axis=1).reshape(b, 2, -1, x.shape[-1])

            found.append([(both(k), both(v * scale.astype(v.dtype))) for k, v in layers])
        return tuple(zip(*found, strict=True))

    # Previews ---------------------------------------------------------------------------------------------------------

    def preview_net(self, config: TinyVAEConfig, dtype: DTypeLike = jnp.float32) -> AutoencoderTiny:
        """The module of a tiny autoencoder, whose latents are the model's.

        Raises:
            ValueError: where they are not.
        """
        theirs, own = (config.latent_channels, config.factor), (self.latent_channels, self.factor)
        if theirs != own:
            raise ValueError(
                f"It is for another model: its latents have {theirs[0]} channels and {theirs[1]} pixels to a side, and "
                f"this model's {own[0]} and {own[1]}."
            )
        return build.tiny_vae(config, dtype)

    # Autoencoder ------------------------------------------------------------------------------------------------------

    def encode(self, params: Params, image: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """Images in [-1, 1] to their most likely latents, at unit variance."""
        moments = self.vae.apply({"params": params}, image, method="encode")
        return self.latent_scale * moments[..., : self.latent_channels]  # pyright: ignore

    def decode(self, params: Params, latent: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Latents at unit variance to images, which may overshoot [-1, 1]."""
        return self.vae.apply({"params": params}, latent / self.latent_scale, method="decode")  # pyright: ignore


def check_reads_no_vector(unet: UNetConfig, whose: str) -> None:
    """Whether a denoiser reads no vector beside time and context.

    Raises:
        ValueError: where it does.
    """
    for name in ("addition_embed_type", "class_embed_type"):
        if (kind := getattr(unet, name)) is not None:
            raise ValueError(f"The denoiser's {name} is {kind!r}; {whose} is null.")


def _kinds(channels: Sequence[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(channels)))


def weighed(
    read: Callable[[Int[Array, "m t"]], tuple[Array, ...]], tokens: Tokens
) -> tuple[Float[Array, "*n chunks length d"], tuple[Array, ...]]:
    """The features of tokens by a text encoder, weighed, and what else it makes of each text's first chunk.

    Args:
        read: from rows of tokens to features [m, t, d] and further results [m, ...].
        tokens: texts [*n].
    """
    ids, weights, empty = tokens
    rows = jnp.concatenate([empty[None], ids.reshape(-1, ids.shape[-1])])
    features, *others = read(rows)
    nothing, features = jnp.split(features, [1])
    features += (weights.reshape(-1, weights.shape[-1], 1) - 1) * (features - nothing)  # weight 1 is exact
    first = tuple(other[1:].reshape(*ids.shape[:-1], *other.shape[1:])[..., 0, :] for other in others)
    return features.reshape(*ids.shape, -1), first


def in_a_row(features: Float[Array, "*n chunks length d"]) -> Float[Array, "*n chunks*length d"]:
    """Chunk after chunk."""
    return features.reshape(*features.shape[:-3], -1, features.shape[-1])
