"""The networks and the noise schedule, by the field names of diffusers' and transformers' `config.json` files."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxdiff.config.base import Checked, at_most, one_of, positive, require

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
Activation = Literal["silu", "mish", "gelu", "relu"]
"""An activation of residual blocks, of those that diffusers has."""
MOST_LAYERS = 200
"""Of a network, one after the other; each is traced, so that a slip in a file would take hours."""


@dataclass(frozen=True)
class UNetConfig(Checked):
    """`unet/config.json`. `attention_head_dim` is the *number* of heads per level, as diffusers reads it."""

    sample_size: int | tuple[int, ...] | None = 64
    """Latent pixels along each side, or (height, width), that the network was trained at."""
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
    act_fn: Activation = "silu"
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """Whether the timestep's embedding is added to a residual block's features, or scales and shifts them."""
    mid_block_scale_factor: float = 1.0
    """What the sums of the middle's residual blocks are divided by."""
    center_input_sample: bool = False
    """Whether the network reads 2 x - 1 in place of x."""
    addition_embed_type: Literal["text_time"] | None = None
    """With "text_time" the network reads a vector for the whole prompt and numbers, such as an image's sizes, too."""
    addition_time_embed_dim: int | None = None
    """Features that each of the numbers becomes."""
    projection_class_embeddings_input_dim: int | None = None
    """Features of the vector and of all numbers."""
    time_cond_proj_dim: int | None = None
    """Features that the guidance scale becomes, of a network that was distilled to read it (Luo et al. 2023, LCM)."""
    class_embed_type: Literal["projection"] | None = None
    """With "projection" the network reads a vector of `projection_class_embeddings_input_dim` features (unCLIP)."""
    num_class_embeds: int | None = None
    """Labels of which the network reads one, as of a noise level (upscalers)."""

    def _check(self) -> None:
        n = len(self.block_out_channels)
        require(n > 0, "UNetConfig.block_out_channels is empty; give the channels of each level.")
        positive(
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
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
            "time_cond_proj_dim",
            "num_class_embeds",
        )
        require(
            not isinstance(self.sample_size, tuple) or len(self.sample_size) == 2,
            f"UNetConfig.sample_size is {self.sample_size}; it must be one number, or height and width.",
        )
        at_most(self, MOST_LAYERS, "layers_per_block", "transformer_layers_per_block")
        for name in ("down_block_types", "up_block_types"):
            require(
                len(getattr(self, name)) == n,
                f"UNetConfig.{name} names {len(getattr(self, name))} blocks, "
                f"block_out_channels has {n} levels; they must be as many.",
            )
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"):
            value = getattr(self, name)
            require(
                not isinstance(value, tuple) or len(value) == n,
                f"UNetConfig.{name} is {value}; give one number, or one for each of the {n} levels.",
            )
        for block in self.down_block_types:
            one_of("UNetConfig.down_block_types", block, DOWN_BLOCKS)
        for block in self.up_block_types:
            one_of("UNetConfig.up_block_types", block, UP_BLOCKS)
        one_of("UNetConfig.mid_block_type", self.mid_block_type, ("UNetMidBlock2DCrossAttn",))
        one_of("UNetConfig.downsample_padding", self.downsample_padding, (1,))
        only = self.only_cross_attention
        require(
            not isinstance(only, tuple) or len(only) == n,
            f"UNetConfig.only_cross_attention is {only}; give one value, or one for each of the {n} levels.",
        )
        require(
            self.mid_block_scale_factor != 0,
            "UNetConfig.mid_block_scale_factor is 0; sums are divided by it, so make it 1, or any number but 0.",
        )
        sizes = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        require(
            self.addition_embed_type is None or None not in sizes,
            f"UNetConfig.addition_embed_type is {self.addition_embed_type!r}, with addition_time_embed_dim {sizes[0]} "
            f"and projection_class_embeddings_input_dim {sizes[1]}; give both.",
        )
        require(
            self.class_embed_type is None or (sizes[1] is not None and self.addition_embed_type is None),
            f"UNetConfig.class_embed_type is {self.class_embed_type!r}, with addition_embed_type "
            f"{self.addition_embed_type!r} and projection_class_embeddings_input_dim {sizes[1]}; it needs the latter, "
            "and does not go with the former.",
        )
        half = self.block_out_channels[0] // 2
        require(
            self.freq_shift < half,
            f"UNetConfig.freq_shift is {self.freq_shift}; it must be below {half}, half of the first level's channels.",
        )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            require(
                channels % self.norm_num_groups == 0,
                f"UNetConfig.block_out_channels has {channels}, which "
                f"norm_num_groups {self.norm_num_groups} does not divide.",
            )
            require(
                channels % heads == 0,
                f"UNetConfig.block_out_channels has {channels}, which {heads} heads "
                "(attention_head_dim) do not divide.",
            )

    def per_level(self, name: str) -> tuple[Any, ...]:
        """The value of a field for each level, where one number stands for all."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width in latent pixels that the network was trained at, if it says."""
        size = self.sample_size
        return (size[0], size[1]) if isinstance(size, tuple) else None if size is None else (size, size)

    @property
    def labels(self) -> int | None:
        """Labels of which the network reads one, as diffusers reads the two fields."""
        return self.num_class_embeds if self.class_embed_type is None else None

    @property
    def added_features(self) -> int:
        """Features of all that the network reads beside time and context: `Conditioning.pooled` and the numbers."""
        kinds = self.addition_embed_type, self.class_embed_type
        return 0 if kinds == (None, None) else self.projection_class_embeddings_input_dim or 0

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return self.per_level("num_attention_heads" if self.num_attention_heads is not None else "attention_head_dim")


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """`config.json` of a ControlNet: a UNet's way down, and the image's embedding."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: bool = False
    """Whether its features are means over the image, as for one that shuffles."""

    def _check(self) -> None:
        super()._check()
        positive(self, "conditioning_channels", "conditioning_embedding_out_channels")
        one_of("ControlNetConfig.conditioning_channels", self.conditioning_channels, (3,))
        one_of("ControlNetConfig.class_embed_type", self.class_embed_type, (None,))
        one_of("ControlNetConfig.num_class_embeds", self.num_class_embeds, (None,))
        require(
            len(self.conditioning_embedding_out_channels) > 0,
            "ControlNetConfig.conditioning_embedding_out_channels is empty; give the channels of each level.",
        )

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


@dataclass(frozen=True)
class T2IAdapterConfig(Checked):
    """`config.json` of a T2I-Adapter."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: Literal["full_adapter", "full_adapter_xl", "light_adapter"] = "full_adapter"

    def _check(self) -> None:
        positive(self, "in_channels", "channels", "num_res_blocks", "downscale_factor")
        one_of("T2IAdapterConfig.in_channels", self.in_channels, (3,))
        require(len(self.channels) > 0, "T2IAdapterConfig.channels is empty; give the channels of each level.")
        light = self.adapter_type == "light_adapter"
        require(
            not light or all(width % 4 == 0 for width in self.channels),
            f"T2IAdapterConfig.channels is {self.channels}; those of a light_adapter must be multiples of 4.",
        )


@dataclass(frozen=True)
class VAEConfig(Checked):
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
    act_fn: Activation = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    """Whether a 1x1 convolution follows the encoder."""
    use_post_quant_conv: bool = True
    """Whether a 1x1 convolution goes before the decoder."""

    later = ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")

    def _check(self) -> None:
        n = len(self.block_out_channels)
        require(n > 0, "VAEConfig.block_out_channels is empty; give the channels of each level.")
        positive(
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
        at_most(self, MOST_LAYERS, "layers_per_block")
        for name, allowed in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            require(
                len(getattr(self, name)) == n,
                f"VAEConfig.{name} names {len(getattr(self, name))} blocks, "
                f"block_out_channels has {n} levels; they must be as many.",
            )
            for block in getattr(self, name):
                one_of(f"VAEConfig.{name}", block, (allowed,))
        for channels in self.block_out_channels:
            require(
                channels % self.norm_num_groups == 0,
                f"VAEConfig.block_out_channels has {channels}, which "
                f"norm_num_groups {self.norm_num_groups} does not divide.",
            )

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class Dinov2Config(Checked):
    """`config.json` of a DINOv2, with or without registers."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu"] = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    """Pixels along each side, that its table of positions is for."""
    patch_size: int = 14
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0

    def _check(self) -> None:
        positive(
            self, "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "layer_norm_eps",
            "image_size", "patch_size",
        )  # fmt: skip
        at_most(self, MOST_LAYERS, "num_hidden_layers")
        at_most(self, 4096, "image_size", "mlp_ratio", "num_register_tokens")
        require(
            self.num_register_tokens >= 0,
            f"Dinov2Config.num_register_tokens is {self.num_register_tokens}; it must not be negative.",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"Dinov2Config.hidden_size {self.hidden_size} is "
            f"not a multiple of num_attention_heads {self.num_attention_heads}.",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"Dinov2Config.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.",
        )


@dataclass(frozen=True)
class TinyVAEConfig(Checked):
    """`config.json` of an AutoencoderTiny, such as TAESD's: a factor of 2 for each level after the first."""

    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    act_fn: Activation = "relu"
    scaling_factor: float = 1.0

    def _check(self) -> None:
        widths = ("encoder_block_out_channels", "decoder_block_out_channels")
        positive(self, "latent_channels", *widths, "num_encoder_blocks", "num_decoder_blocks", "scaling_factor")
        for half in ("encoder", "decoder"):
            channels, blocks = getattr(self, f"{half}_block_out_channels"), getattr(self, f"num_{half}_blocks")
            require(
                0 < len(channels) == len(blocks),
                f"TinyVAEConfig.{half}_block_out_channels has {len(channels)} levels and num_{half}_blocks "
                f"{len(blocks)}; they must be as many, and one at least.",
            )
            require(
                len(set(channels)) == 1,
                f"TinyVAEConfig.{half}_block_out_channels is {channels}; all levels must have the same width.",
            )

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.decoder_block_out_channels) - 1)


MOST_PIXELS = 4096
"""Along a side of what a vision tower reads."""
CLIPActivation = Literal["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "relu"]


@dataclass(frozen=True)
class CLIPTextConfig(Checked):
    """`text_encoder/config.json`."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: CLIPActivation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    def _check(self) -> None:
        positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "projection_dim",
            "max_position_embeddings",
            "layer_norm_eps",
        )
        at_most(self, MOST_LAYERS, "num_hidden_layers")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPTextConfig.hidden_size {self.hidden_size} is "
            f"not a multiple of num_attention_heads {self.num_attention_heads}.",
        )


@dataclass(frozen=True)
class CLIPVisionConfig(Checked):
    """`config.json` of CLIP's vision tower, which reads images of `image_size` pixels along each side."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: CLIPActivation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def _check(self) -> None:
        positive(
            self,
            "hidden_size",
            "intermediate_size",
            "projection_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
            "layer_norm_eps",
        )
        at_most(self, MOST_LAYERS, "num_hidden_layers")
        at_most(self, MOST_PIXELS, "image_size")
        one_of("CLIPVisionConfig.num_channels", self.num_channels, (3,))
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPVisionConfig.hidden_size {self.hidden_size} is "
            f"not a multiple of num_attention_heads {self.num_attention_heads}.",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"CLIPVisionConfig.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.",
        )

    @property
    def tokens(self) -> int:
        """Feature vectors of an image: one for each patch, and the class token's before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class ImageNormalizerConfig(Checked):
    """`image_normalizer/config.json` of an unCLIP model."""

    embedding_dim: int = 768

    def _check(self) -> None:
        positive(self, "embedding_dim")


@dataclass(frozen=True)
class IPAdapterConfig(Checked):
    """The sizes of an IP-Adapter, which its file shows."""

    kind: Literal["plain", "plus", "full"] = "plain"
    channels: tuple[int, ...] = ()
    """Of each cross-attention, in the order of a UNet's way down, its way up and its middle."""
    cross_attention_dim: int = 768
    image_features: int = 1024
    """What an image encoder gives: of "plain" its projection's, else its layers'."""
    tokens: int = 4
    """Vectors that an image becomes; of "full" as many as the image encoder gives."""
    hidden: int = 0
    """This and what follows is the resampler's, of "plus"."""
    depth: int = 0
    inner: int = 0
    """Channels of all heads of its attention."""
    feedforward: int = 0

    def _check(self) -> None:
        own = ("hidden", "depth", "inner", "feedforward") if self.kind == "plus" else ()
        positive(self, "channels", "cross_attention_dim", "image_features", "tokens", *own)
        at_most(self, MOST_LAYERS, "depth")
        require(len(self.channels) > 0, "IPAdapterConfig.channels is empty; give the channels of each layer.")
        require(
            self.inner % 64 == 0, f"IPAdapterConfig.inner is {self.inner}; it must be a multiple of 64, a head's size."
        )


@dataclass(frozen=True)
class ImageProcessorConfig(Checked):
    """`preprocessor_config.json`: how an image becomes what a vision tower reads. The defaults are CLIP's."""

    size: tuple[int, ...] = (224,)
    """What the shorter side becomes; or height and width."""
    crop_size: tuple[int, ...] = (224, 224)
    """Height and width of the middle that is left of it."""
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = 3
    """Pillow's number of a filter; 3 is bicubic."""
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def _check(self) -> None:
        positive(self, "size", "crop_size", "rescale_factor", "image_std")
        at_most(self, MOST_PIXELS, "size", "crop_size")
        one_of("ImageProcessorConfig.resample", self.resample, tuple(range(6)))
        for name, lengths in (("size", (1, 2)), ("crop_size", (2,)), ("image_mean", (3,)), ("image_std", (3,))):
            value = getattr(self, name)
            require(
                len(value) in lengths,
                f"ImageProcessorConfig.{name} is {value}; it must have {' or '.join(map(str, lengths))} numbers.",
            )


@dataclass(frozen=True)
class SchedulerConfig(Checked):
    """`scheduler/scheduler_config.json`: the noise schedule and how to walk it."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    """The betas of all training steps themselves, in place of `beta_schedule`."""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    """Where the last step of samplers from k-diffusion and of DPM solvers ends: at 0, or at the lowest level."""
    shift: float = 1.0
    """Flow matching only, which has no betas: above 1, times lie nearer to noise (Esser et al. 2024, eq. 23)."""

    def _check(self) -> None:
        positive(self, "num_train_timesteps", "clip_sample_range", "shift")
        flow = self.prediction_type == "flow_prediction"
        require(
            flow or self.shift == 1,
            f"SchedulerConfig.shift is {self.shift}; it is for prediction_type 'flow_prediction', here 1.",
        )
        require(
            not (flow and self.rescale_betas_zero_snr),
            "SchedulerConfig.rescale_betas_zero_snr is for betas; flow_prediction has none, and ends in noise anyway.",
        )
        require(
            not (flow and self.clip_sample),
            "SchedulerConfig.clip_sample is True; flow_prediction has no clipping, so make it False.",
        )
        betas = self.trained_betas
        require(
            betas is None or (len(betas) == self.num_train_timesteps and all(0 < beta < 1 for beta in betas)),
            f"SchedulerConfig.trained_betas has {len(betas or ())} numbers; it must have num_train_timesteps of them, "
            f"{self.num_train_timesteps}, between 0 and 1.",
        )
        require(
            0 < self.beta_start <= self.beta_end < 1,
            f"SchedulerConfig.beta_start {self.beta_start} and beta_end "
            f"{self.beta_end} must satisfy 0 < beta_start <= beta_end < 1.",
        )
        require(
            0 <= self.steps_offset < self.num_train_timesteps,
            f"SchedulerConfig.steps_offset is {self.steps_offset}; it must lie in [0, {self.num_train_timesteps}).",
        )
        require(
            not self.rescale_betas_zero_snr or self.num_train_timesteps > 1,
            "SchedulerConfig.rescale_betas_zero_snr needs num_train_timesteps above 1: one step would be all noise.",
        )
