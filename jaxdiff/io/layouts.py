"""What is known of the published layouts of single files: where networks are, and what shapes do not say."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from jaxdiff.config import CLIPTextConfig, ControlNetConfig, SchedulerConfig, UNetConfig, VAEConfig
from jaxdiff.io import ldm

Shapes = Mapping[str, tuple[int, ...]]
"""By diffusers' names, in torch's order."""


class Place(NamedTuple):
    """Where a network's tensors are in a file."""

    network: str
    prefix: str
    anchor: str
    """A tensor that tells, after the prefix, that the network is there."""
    openclip: bool = False
    xl: bool | None = None
    """Whether files of Stable Diffusion XL and its refiner have it there, or others; None is all."""


PLACES = (
    Place("unet", "model.diffusion_model.", "input_blocks.0.0.weight"),
    Place("unet", "", "input_blocks.0.0.weight"),
    Place("vae", "first_stage_model.", "decoder.mid.block_1.norm1.weight"),
    Place("vae", "vae.", "decoder.mid.block_1.norm1.weight"),
    Place("vae", "", "decoder.mid.block_1.norm1.weight"),
    Place("text_encoder", "cond_stage_model.transformer.", "text_model.embeddings.token_embedding.weight", xl=False),
    # As some merges do.
    Place("text_encoder", "cond_stage_model.transformer.", "embeddings.token_embedding.weight", xl=False),
    Place("text_encoder", "cond_stage_model.model.", "token_embedding.weight", openclip=True, xl=False),
    Place("text_encoder", "conditioner.embedders.0.transformer.", "text_model.embeddings.token_embedding.weight",
          xl=True),
    Place("text_encoder_2", "conditioner.embedders.1.model.", "token_embedding.weight", openclip=True, xl=True),
    # The refiner's, which has no other.
    Place("text_encoder_2", "conditioner.embedders.0.model.", "token_embedding.weight", openclip=True, xl=True),
)  # fmt: skip

# What a file seems to be that is not read yet, by names that it has; the first that is found.
OTHERS = (
    (r"(^|\.)(lora_|lora\.|hada_w1|lokr_w1|lora_[AB]\.)|\.(hada_|lokr_|lora_)|dora_scale$",
     "a LoRA or one of its kin; give it by --lora beside a model"),
    (r"^(control_model|input_hint_block|zero_convs|controlnet_)", "a ControlNet; give it by --control beside a model"),
    (r"(^|\.)double_blocks\.", "a Flux model, and Flux is not supported yet"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model, and that is not supported yet"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter; give it by --ip-adapter beside a model"),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter; give its folder with a config.json by --control beside a model"),
    (r"^(emb_params|clip_l|clip_g|string_to_param.*)$", "a textual inversion; give it by --embedding beside a model"),
    (r"^(model\.diffusion_model\.)?label_emb\.weight",
     "an upscaler, which is read from folders alone"),
    (r"^(noise_augmentor|embedder\.model\.visual)\.", "an unCLIP model, which is read from folders alone"),
    (r"^edm_mean$", "a model with a mean and a scale of each latent channel, which is not supported yet"),
    (r"^(down_blocks|encoder\.down_blocks|text_model|encoder\.layers|embeddings)\.",
     "a network of a diffusers folder; name the folder that it belongs to"),
    (r"^(vision_model|visual)\.", "an image encoder; give its folder by --image-encoder beside an IP-Adapter"),
    (r"^(encoder\.block|shared\.weight)", "a T5 text encoder, which is not supported yet"),
)  # fmt: skip
EMA = "model_ema."
"""Of averages; what follows is a weight's name without `model.` and without dots."""

# What is no network's and says nothing about what is drawn: buffers of the noise schedule, counters, weights of losses,
# tensors of CLIP that a text encoder has no use for, and other averages of the same weights.
IGNORED = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|lvlb_weights|logvar|scale_factor"
    r"|denoiser\.sigmas|global_step|model_ema\..*|(first_stage_model\.|vae\.)?(loss|model_ema)\..*"
    r"|v_pred|ztsnr|.*\.position_ids|cond_stage_model\..*\.(logit_scale|attn_mask|text_projection(\.weight)?)"
    r"|conditioner\..*\.(logit_scale|attn_mask))"
)


class Layout(NamedTuple):
    """What a published layout has where shapes do not say it."""

    name: str
    head_channels: int | None
    """Channels of a head of the denoiser's attention; None is 8 heads at every level."""
    activation: str
    """Of the text encoder; that of `text_encoder_2` is gelu."""
    pad_id: int | None
    """The token that fills up the text encoder's prompts; None is the end token. That of `text_encoder_2` is 0."""
    side: int = 64
    """Latent pixels along each side that the published model was trained at."""
    latent_scale: float = 0.18215
    """A latent times this has unit variance."""
    numbers: int | None = None
    """How many numbers the denoiser reads beside its prompt's vector; None is neither."""


_HEADS = 8
HEAD_CHANNELS = 64
"""Of a head of CLIP's text towers, and of Stable Diffusion 2's denoiser."""
SD1 = Layout("Stable Diffusion 1", None, "quick_gelu", None)
SD2 = Layout("Stable Diffusion 2", HEAD_CHANNELS, "gelu", 0)
SDXL = Layout("Stable Diffusion XL", HEAD_CHANNELS, "quick_gelu", None, 128, 0.13025, 6)
REFINER = SDXL._replace(name="the refiner of Stable Diffusion XL", numbers=5)
_NUMBER_FEATURES = 256
"""Of each of the numbers that Stable Diffusion XL reads."""
_REFINER_CONTEXT = 1280
"""Features of a token, in the refiner."""
_OPENCLIP_LAYERS = 24
SCHEDULER = SchedulerConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
# Fields that shapes do not say; of a file that was written here its metadata do, where they differ from the layout's.
_OF_TEXT = ("num_attention_heads", "hidden_act", "layer_norm_eps", "projection_dim", "bos_token_id", "eos_token_id",
            "pad_token_id")  # fmt: skip
UNSAID = {
    "unet": ("sample_size", "attention_head_dim", "norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift",
             "addition_time_embed_dim"),
    "vae": ("sample_size", "norm_num_groups", "scaling_factor"),
    "text_encoder": _OF_TEXT,
    "text_encoder_2": _OF_TEXT,
    "scheduler": tuple(field.name for field in fields(SchedulerConfig)),
}  # fmt: skip


def seems_to_be(names: Iterable[str]) -> str | None:
    """What a file of these names seems to be, if it is not one that is read."""
    names = list(names)
    return next((words for pattern, words in OTHERS if any(re.search(pattern, name) for name in names)), None)


def place_to_write(name: str, layout: Layout, openclip: bool, alone: bool) -> Place:
    """Where a network is written; a VAE alone is a VAE file, whose names have no prefix."""
    xl = layout.numbers is not None
    places = [place for place in PLACES if place.network == name and place.xl in (None, xl)]
    if name == "text_encoder":
        return next(place for place in places if place.openclip == (openclip and not xl))
    if name == "text_encoder_2":
        return places[layout is REFINER]
    return next(place for place in places if (place.prefix == "") == (alone and name == "vae"))


def used_layers(names: Iterable[str]) -> int:
    """Layers of OpenCLIP's tower that Stable Diffusion 2 uses: all but the last of a whole one.

    A file that was made from a diffusers folder has only those, and neither the projection nor the scale behind them.
    """
    names = set(names)
    layers = ldm.openclip_layers(names)
    whole = layers == _OPENCLIP_LAYERS or not names.isdisjoint({"text_projection", "logit_scale"})
    return layers - 1 if whole else layers


# Configs from shapes --------------------------------------------------------------------------------------------------


class NotThere(Exception):
    """The name of a tensor that a config is found from, and that is missing or has no such shape."""


def xl_layout(context: int) -> Layout:
    """The layout of a denoiser that reads numbers, by the features that it reads of each token."""
    return REFINER if context == _REFINER_CONTEXT else SDXL


def _unet_values(shapes: Shapes, layout: Layout) -> dict[str, Any]:
    values = _down_values(shapes, layout)
    up = [f"up_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(len(values["down_block_types"]))]
    return values | {
        "out_channels": _size(shapes, "conv_out.weight", 0),
        "up_block_types": tuple("CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in up),
    }


def _control_values(shapes: Shapes, layout: Layout) -> dict[str, Any]:
    embedding = "controlnet_cond_embedding"
    halvings = ldm.count_items(shapes, f"{embedding}.blocks") // 2
    wide = [f"blocks.{2 * i + 1}" for i in range(halvings)]
    widths = tuple(_size(shapes, f"{embedding}.{name}.weight", 0) for name in ("conv_in", *wide))
    values = _down_values(shapes, layout)
    return values | {
        "up_block_types": mirrored(values["down_block_types"]),
        "conditioning_channels": _size(shapes, f"{embedding}.conv_in.weight", 1),
        "conditioning_embedding_out_channels": widths,
    }


def mirrored(down_block_types: Sequence[str]) -> tuple[str, ...]:
    """The types of a UNet's way up that is the way down backwards."""
    return tuple(kind.replace("Down", "Up") for kind in reversed(down_block_types))


def _down_values(shapes: Shapes, layout: Layout) -> dict[str, Any]:
    levels = range(ldm.count_items(shapes, "down_blocks"))
    channels = tuple(_size(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in levels)
    layers = tuple(ldm.count_items(shapes, f"down_blocks.{i}.resnets") for i in levels)
    down = [f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in levels]
    # The last level's depth is the middle's (`jaxdiff.build`), and so is that of a level without attention, which has
    # none.
    deep = [f"down_blocks.{i}" if down[i] and i < len(levels) - 1 else "mid_block" for i in levels]
    depths = tuple(ldm.count_items(shapes, f"{block}.attentions.0.transformer_blocks") for block in deep)
    split = layout.head_channels
    added = {}
    if "add_embedding.linear_1.weight" in shapes:
        features = _size(shapes, "add_embedding.linear_1.weight", 1)
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": _NUMBER_FEATURES,
            "projection_class_embeddings_input_dim": features,
        }
    return added | {
        "in_channels": _size(shapes, "conv_in.weight", 1),
        "down_block_types": tuple("CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in down),
        "block_out_channels": channels,
        "layers_per_block": one_value(layers),
        "transformer_layers_per_block": one_value(depths),
        "attention_head_dim": tuple(_HEADS if split is None else _heads(width, split) for width in channels),
        "cross_attention_dim": _size(shapes, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(_shape(shapes, "mid_block.attentions.0.proj_in.weight")) == 2,
        "norm_num_groups": 32,
    }


def _vae_values(shapes: Shapes, layout: Layout) -> dict[str, Any]:
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
        "scaling_factor": layout.latent_scale,
    }


def _text_values(shapes: Shapes, layout: Layout) -> dict[str, Any]:
    vocabulary, width = (_size(shapes, "text_model.embeddings.token_embedding.weight", axis) for axis in (0, 1))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _size(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": ldm.count_items(shapes, "text_model.encoder.layers"),
        "num_attention_heads": _heads(width, HEAD_CHANNELS),
        "max_position_embeddings": _size(shapes, "text_model.embeddings.position_embedding.weight", 0),
        "hidden_act": layout.activation,
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _text_2_values(shapes: Shapes, layout: Layout) -> dict[str, Any]:
    values = _text_values(shapes, layout._replace(activation="gelu"))
    return values | {"projection_dim": _size(shapes, "text_projection.weight", 0)}


VALUES = {
    "controlnet": _control_values, "unet": _unet_values, "vae": _vae_values, "text_encoder": _text_values,
    "text_encoder_2": _text_2_values,
}  # fmt: skip
"""Functions of shapes and a layout to the values of a config, which are not checked."""
CLASSES = {
    "controlnet": ControlNetConfig, "unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,
}  # fmt: skip


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """A tensor's shape, which has two axes or more."""
    if len(shapes.get(name, ())) < 2:
        raise NotThere(name)
    return shapes[name]


def _size(shapes: Shapes, name: str, axis: int) -> int:
    return _shape(shapes, name)[axis]


def one_value(values: tuple[int, ...]) -> Any:
    """One number where all levels have the same."""
    return values[0] if values and values.count(values[0]) == len(values) else values


def _heads(channels: int, head_channels: int) -> int:
    """Heads of so many channels each; 0 where that is no whole number."""
    return 0 if channels % head_channels else channels // head_channels
