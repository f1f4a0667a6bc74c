"""The denoising network of Stable Diffusion (Rombach et al. 2022, section 3.2), named as in diffusers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nn.attention import CONTEXT_KEYS
from jaxdiff.nn.blocks import CrossAttentionMiddle, DownStage, UpStage
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import GroupNorm, Remat, TimestepMLP, timestep_embedding
from jaxdiff.nn.linear import Dense
from jaxdiff.types import Context, Params

OUTER = 2
"""Blocks next to the output that are computed at every step, where `deep` features are kept over some."""


class UNet2DConditionModel(nn.Module):
    """Predicts noise, velocity or the clean latent from a noisy one, the step number and the prompt's features.

    Each tuple has one entry a level, from the finest. `depths` counts transformer blocks after each residual block on
    the way down and (in the same order of levels) on the way up; 0 is a level without attention, and `mid_depth` is the
    middle's. `activation` and `scale_shift` are those of all residual blocks, `mid_divisor` is the middle's divisor
    (see `ResnetBlock`). With `center_input` the network reads 2 x - 1.
    """

    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    down_depths: tuple[int, ...]
    up_depths: tuple[int, ...]
    mid_depth: int
    heads: tuple[int, ...]
    linear_projection: bool = False
    groups: int = 32
    eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    activation: str = "silu"
    scale_shift: bool = False
    mid_divisor: float = 1.0
    center_input: bool = False
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Context,
        deep: Float[Array, "b h w d"] | None = None,
        *,
        only_deep: bool = False,
    ) -> Float[Array, "b h w c2"]:
        """The prediction; or with `only_deep` what the last `OUTER` blocks take from below.

        Given as `deep`, this stands in for all the network but those blocks, their skips and the ends (Ma et al. 2023,
        DeepCache, eq. 4). The collection "prompt" may hold what `prompt_keys` makes of `context`, and "rows" what
        `perturbed` or `structured` make.
        """
        emb = timestep_embedding(
            t, self.channels[0], flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        ).astype(self.dtype)
        emb = TimestepMLP(4 * self.channels[0], self.dtype, self.activation, name="time_embedding")(emb)
        context = context.astype(self.dtype)
        last = len(self.channels) - 1

        def stage(level: int, depth: int) -> dict:
            return {
                "channels": self.channels[level],
                "groups": self.groups,
                "eps": self.eps,
                "depth": depth,
                "heads": self.heads[level],
                "linear_projection": self.linear_projection,
                "dtype": self.dtype,
                "remat": self.remat,
                "activation": self.activation,
                "scale_shift": self.scale_shift,
            }

        def down(i: int) -> DownStage:
            sizes = stage(i, self.down_depths[i])
            return DownStage(layers=self.layers[i], downsample=i < last, name=f"down_blocks_{i}", **sizes)

        def up(i: int) -> UpStage:
            level = last - i
            sizes = stage(level, self.up_depths[level])
            return UpStage(layers=self.layers[level] + 1, name=f"up_blocks_{i}", **sizes)

        if self.center_input:
            x = 2 * x - 1
        x = Conv3x3(self.channels[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        skips = (x,)
        outermost = up(last)
        inner = max(0, outermost.layers - OUTER)
        if deep is None:
            for i in range(last + 1):
                x, new_skips = down(i)(x, emb, context)
                skips += new_skips
            sizes = stage(last, self.mid_depth)
            middle = CrossAttentionMiddle(layers=1, divisor=self.mid_divisor, name="mid_block", **sizes)
            x = middle(x, emb, context)
            for i in range(last):
                layers = self.layers[last - i] + 1
                skips, used = skips[:-layers], skips[-layers:]
                x = up(i)(x, emb, context, skips=used, size=(skips[-1].shape[1], skips[-1].shape[2]))
            deep = outermost(x, emb, context, skips=skips, part=range(inner))
        else:
            skips += down(0)(x, emb, context, first=outermost.layers - inner - 1)[1]
        if only_deep:
            return deep
        x = outermost(deep, emb, context, skips=skips, part=range(inner, outermost.layers))

        x = GroupNorm(self.groups, self.eps, self.dtype, self.activation, name="conv_norm_out")(x)
        return Conv3x3(self.out_channels, dtype=self.dtype, name="conv_out")(x)


def prompt_keys(params: Params, context: Context, dtype: DTypeLike) -> Params:
    """Keys and values of every cross-attention, [b t c] each, in the params' tree: the UNet's collection "prompt".

    They depend on the prompt alone, and so are computed once for all steps.
    """
    kept = {}
    for name, child in params.items():
        if name == "attn2":
            project = Dense(child["to_k"]["kernel"].shape[-1], use_bias=False, dtype=dtype)
            kept[name] = {key: project.apply({"params": child[key]}, context) for key in CONTEXT_KEYS}
        elif isinstance(child, dict) and (inner := prompt_keys(child, context, dtype)):
            kept[name] = inner
    return kept


def perturbed(params: Params, rows: Bool[Array, " n"]) -> Params:
    """The collection "rows" in which these rows' self-attention in the middle is the identity (Ahn et al. 2024, PAG,
    eq. 15, in the layers that they find best)."""
    layers = _self_attentions(params["mid_block"])
    return {"mid_block": _at(layers, "identity", rows)}


def structured(params: Params, source: Int[Array, " n"]) -> Params:
    """The collection "rows" in which each row takes its layout from row `source[i]`: queries and keys of the
    self-attention on the way up, and one block's features (Tumanyan et al. 2023, plug-and-play, section 4)."""
    ups = {name: child for name, child in params.items() if name.startswith("up_blocks_")}
    rows = {name: _at(_self_attentions(child), "source", source) for name, child in ups.items()}
    if "resnets_1" in ups.get("up_blocks_1", {}):
        rows["up_blocks_1"]["resnets_1"] = {"source": source}
    return rows


def _self_attentions(params: Params) -> Params:
    """The part of the tree that leads to them."""
    found = {}
    for name, child in params.items():
        if name == "attn1":
            found[name] = {}
        elif isinstance(child, dict) and (inner := _self_attentions(child)):
            found[name] = inner
    return found


def _at(layers: Params, name: str, value: Array) -> Params:
    """The tree with `{name: value}` at its ends."""
    return {key: _at(child, name, value) if child else {name: value} for key, child in layers.items()}
