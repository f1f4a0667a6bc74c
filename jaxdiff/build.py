"""Config to module: the one place where the names in `config.json` become the fields of a network."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxdiff.config import (
    AdversaryConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    Dinov2Config,
    ImageNormalizerConfig,
    IPAdapterConfig,
    LPIPSConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from jaxdiff.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxdiff.models.clip_vision import CLIPVisionModelWithProjection
from jaxdiff.models.controlnet import ControlNetModel
from jaxdiff.models.dinov2 import Dinov2Model
from jaxdiff.models.image_normalizer import StableUnCLIPImageNormalizer
from jaxdiff.models.ip_adapter import IPAdapter
from jaxdiff.models.lpips import LPIPS, SMALLEST
from jaxdiff.models.patchgan import PatchDiscriminator, smallest
from jaxdiff.models.t2i_adapter import T2IAdapter
from jaxdiff.models.tiny_vae import AutoencoderTiny
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.layers import Remat
from jaxdiff.types import Key, Params

NetworkConfig = (
    UNetConfig
    | VAEConfig
    | CLIPTextConfig
    | CLIPVisionConfig
    | Dinov2Config
    | ImageNormalizerConfig
    | IPAdapterConfig
    | T2IAdapterConfig
    | TinyVAEConfig
    | LPIPSConfig
    | AdversaryConfig
)


def unet(config: UNetConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none") -> UNet2DConditionModel:
    """The denoising network; `remat` says what the backward pass computes again (`jaxdiff.nn.layers.remat`)."""
    return UNet2DConditionModel(**_unet_fields(config, dtype, remat))


def controlnet(config: ControlNetConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none") -> ControlNetModel:
    """What adds to a denoising network's features."""
    return ControlNetModel(
        **_unet_fields(config, dtype, remat),
        hidden=config.conditioning_embedding_out_channels,
        pools=config.global_pool_conditions,
        bgr=config.controlnet_conditioning_channel_order == "bgr",
    )


def t2i_adapter(config: T2IAdapterConfig, dtype: DTypeLike = jnp.float32) -> T2IAdapter:
    """What adds to a denoising network's features, once for all steps."""
    return T2IAdapter(
        config.adapter_type, config.channels, config.num_res_blocks, config.downscale_factor, dtype
    )  # fmt: skip


def ip_adapter(config: IPAdapterConfig, dtype: DTypeLike = jnp.float32) -> IPAdapter:
    """What makes an image a prompt of a denoising network."""
    return IPAdapter(
        kind=config.kind,
        channels=config.channels,
        dim=config.cross_attention_dim,
        tokens=config.tokens,
        hidden=config.hidden,
        depth=config.depth,
        inner=config.inner,
        feedforward=config.feedforward,
        dtype=dtype,
    )


def tiny_vae(config: TinyVAEConfig, dtype: DTypeLike = jnp.float32) -> AutoencoderTiny:
    """A tiny autoencoder of the same latents, for previews."""
    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_channels=config.encoder_block_out_channels,
        decoder_channels=config.decoder_block_out_channels,
        encoder_blocks=config.num_encoder_blocks,
        decoder_blocks=config.num_decoder_blocks,
        activation=config.act_fn,
        scale=config.scaling_factor,
        dtype=dtype,
    )


def _unet_fields(config: UNetConfig, dtype: DTypeLike, remat: Remat) -> dict[str, Any]:
    depths = config.per_level("transformer_layers_per_block")

    def masked(blocks: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(depth if block.startswith("CrossAttn") else 0 for depth, block in zip(depths, blocks, strict=True))

    return dict(
        out_channels=config.out_channels,
        channels=config.block_out_channels,
        layers=config.per_level("layers_per_block"),
        down_depths=masked(config.down_block_types),
        up_depths=masked(config.up_block_types[::-1]),  # the file lists them from the coarsest
        mid_depth=depths[-1],
        heads=config.heads,
        linear_projection=config.use_linear_projection,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        activation=config.act_fn,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        mid_divisor=config.mid_block_scale_factor,
        center_input=config.center_input_sample,
        number_features=config.addition_time_embed_dim if config.addition_embed_type else None,
        guidance_features=config.time_cond_proj_dim,
        embeds_pooled=config.class_embed_type is not None,
        labels=config.labels,
        only_context=config.per_level("only_cross_attention"),
        dtype=dtype,
        remat=remat,
    )


def vae(config: VAEConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none") -> AutoencoderKL:
    """The autoencoder."""
    return AutoencoderKL(
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        channels=config.block_out_channels,
        layers=config.layers_per_block,
        groups=config.norm_num_groups,
        activation=config.act_fn,
        attends=config.mid_block_add_attention,
        quant=config.use_quant_conv,
        post_quant=config.use_post_quant_conv,
        dtype=dtype,
        remat=remat,
    )


def text_encoder(
    config: CLIPTextConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none", skip_layers: int = 0
) -> CLIPTextModel:
    """The prompt's reader; `skip_layers` 1 takes the penultimate layer of a full-depth folder."""
    return CLIPTextModel(**_clip(config), skip_layers=skip_layers, dtype=dtype, remat=remat)


def text_encoder_2(
    config: CLIPTextConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none"
) -> CLIPTextModelWithProjection:
    """The second reader of Stable Diffusion XL's prompts, which also makes one vector of the whole prompt."""
    end = None if config.eos_token_id == 2 else config.eos_token_id  # published folders say 2, which it is not
    return CLIPTextModelWithProjection(
        **_clip(config), projection_dim=config.projection_dim, end_id=end, dtype=dtype, remat=remat
    )


def image_encoder(config: CLIPVisionConfig, dtype: DTypeLike = jnp.float32) -> CLIPVisionModelWithProjection:
    """The reader of images that stand beside a prompt, or in its place."""
    return CLIPVisionModelWithProjection(
        hidden_size=config.hidden_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        activation=config.hidden_act,
        eps=config.layer_norm_eps,
        projection_dim=config.projection_dim,
        dtype=dtype,
    )


def dinov2(config: Dinov2Config, dtype: DTypeLike = jnp.float32) -> Dinov2Model:
    """A reader of images that was trained without texts, for features to compare sets of images by."""
    return Dinov2Model(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        patch_size=config.patch_size,
        activation=config.hidden_act,
        swiglu=config.use_swiglu_ffn,
        qkv_bias=config.qkv_bias,
        registers=config.num_register_tokens,
        eps=config.layer_norm_eps,
        dtype=dtype,
    )


def image_normalizer(config: ImageNormalizerConfig, dtype: DTypeLike = jnp.float32) -> StableUnCLIPImageNormalizer:
    """What adds noise to an image's embedding."""
    return StableUnCLIPImageNormalizer(config.embedding_dim, dtype)


def _clip(config: CLIPTextConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_positions": config.max_position_embeddings,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
    }


def lpips(config: LPIPSConfig, dtype: DTypeLike = jnp.float32) -> LPIPS:
    """The distance of two images by a classifier's features."""
    return LPIPS(config.backbone, dtype)


def discriminator(config: AdversaryConfig, dtype: DTypeLike = jnp.float32) -> PatchDiscriminator:
    """What tells copies from images."""
    return PatchDiscriminator(config.channels, config.layers, dtype)


def smallest_side(config: LPIPSConfig | AdversaryConfig) -> int:
    """Pixels along each side of the smallest image that the network takes."""
    return SMALLEST[config.backbone] if isinstance(config, LPIPSConfig) else smallest(config.layers)


def example_inputs(config: NetworkConfig) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The smallest inputs that a network's `__call__` takes: enough to find the shapes of its parameters."""
    if isinstance(config, UNetConfig):
        side = 2 ** (len(config.block_out_channels) - 1)
        x = jnp.zeros((1, side, side, config.in_channels))
        more: dict[str, Any] = {}
        if config.addition_embed_type is not None:
            more = {"pooled": jnp.zeros((1, config.added_features)), "numbers": jnp.zeros((1, 0))}
        if config.class_embed_type is not None:
            more["pooled"] = jnp.zeros((1, config.added_features))
        if config.labels is not None:
            more["numbers"] = jnp.zeros((1, 1))
        if config.time_cond_proj_dim is not None:
            more["guidance"] = jnp.ones((1,))
        if isinstance(config, ControlNetConfig):
            image = jnp.zeros((1, side * config.factor, side * config.factor, config.conditioning_channels))
            more["image"] = image
        return (x, jnp.zeros((1,)), jnp.zeros((1, 1, config.cross_attention_dim))), more
    if isinstance(config, T2IAdapterConfig):
        side = config.downscale_factor * 2 ** len(config.channels)
        return (jnp.zeros((1, side, side, config.in_channels)),), {}
    if isinstance(config, LPIPSConfig | AdversaryConfig):
        image = jnp.zeros((1, smallest_side(config), smallest_side(config), 3))
        return (image, image) if isinstance(config, LPIPSConfig) else (image,), {}
    if isinstance(config, TinyVAEConfig):
        return (jnp.zeros((1, config.factor, config.factor, 3)),), {}
    if isinstance(config, Dinov2Config):
        return (jnp.zeros((1, config.image_size, config.image_size, 3)),), {}
    if isinstance(config, ImageNormalizerConfig):
        return (*(jnp.zeros((1, config.embedding_dim)),) * 2, *(jnp.ones(()),) * 2), {}
    if isinstance(config, IPAdapterConfig):
        return (jnp.zeros((1, *(() if config.kind == "plain" else (1,)), config.image_features)),), {}
    if isinstance(config, CLIPVisionConfig):
        return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels)),), {}
    if isinstance(config, VAEConfig):
        return (jnp.zeros((1, config.factor, config.factor, config.in_channels)),), {}
    return (jnp.zeros((1, config.max_position_embeddings), jnp.int32),), {}


def init(module: nn.Module, config: NetworkConfig, key: Key) -> Params:
    """Random float32 parameters: a pure function of the key, to be jitted with the shardings that are wanted."""
    arguments, named = example_inputs(config)
    return dict(module.init(key, *arguments, **named)["params"])


def param_shapes(module: nn.Module, config: NetworkConfig) -> Params:
    """The tree of `jax.ShapeDtypeStruct`s that `init` would fill, without computing anything."""
    return jax.eval_shape(lambda: init(module, config, jax.random.key(0)))
