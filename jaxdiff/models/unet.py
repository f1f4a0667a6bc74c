"""The denoising network of Stable Diffusion (Rombach et al. 2022, section 3.2), named as in diffusers."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.nn.attention import CONTEXT_KEYS
from jaxdiff.nn.blocks import CrossAttentionMiddle, DownStage, UpStage
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import GroupNorm, Remat, TimestepMLP, timestep_embedding
from jaxdiff.nn.linear import Dense, Embed
from jaxdiff.types import Context, Params

OUTER = 2
"""Blocks next to the output that are computed at every step, where `deep` features are kept over some."""


class Added(NamedTuple):
    """What other networks add to a UNet's features on the way."""

    skips: tuple[Array, ...] = ()
    """One for each skip [b, h, w, c], from the first; means over the image have sides of 1."""
    middle: Array | None = None
    """For what comes out of the middle."""
    stages: tuple[Array, ...] = ()
    """One for each stage on the way down; see `DownStage`."""

    def plus(self, other: "Added") -> "Added":
        """Both together; each has a field whole, or not at all."""

        def both(a: Any, b: Any) -> Any:
            there = [one for one in (a, b) if jax.tree.leaves(one)]
            return jax.tree.map(jnp.add, a, b) if len(there) == 2 else there[0] if there else a

        return Added(*map(both, self, other))


class UNet2DConditionModel(nn.Module):
    """Predicts noise, velocity or the clean latent from a noisy one, the step number and the prompt's features.

    Each tuple has one entry a level, from the finest. `depths` counts transformer blocks after each residual block on
    the way down and (in the same order of levels) on the way up; 0 is a level without attention, and `mid_depth` is the
    middle's. `activation` and `scale_shift` are those of all residual blocks, `mid_divisor` is the middle's divisor
    (see `ResnetBlock`). With `center_input` the network reads 2 x - 1. With `number_features` it takes `pooled` and
    `numbers`, and each number becomes so many features; with `guidance_features` it takes `guidance`, likewise. With
    `embeds_pooled` it takes `pooled` alone; with `labels` it takes one of so many, as the first of `numbers`.
    `only_context` says for each level whether what is else self-attention reads the prompt's features, too.
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
    number_features: int | None = None
    guidance_features: int | None = None
    embeds_pooled: bool = False
    labels: int | None = None
    only_context: tuple[bool, ...] = ()
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Context,
        deep: Float[Array, "b h w d"] | None = None,
        added: Added | None = None,
        *,
        pooled: Float[Array, "b p"] | None = None,
        numbers: Float[Array, "b k"] | None = None,
        guidance: Float[Array, " b"] | None = None,
        only_deep: bool = False,
    ) -> Float[Array, "b h w c2"]:
        """The prediction; or with `only_deep` what the last `OUTER` blocks take from below.

        Stable Diffusion XL reads the vector `pooled` of the whole prompt and `numbers` such as sizes (Podell et al.
        2023, section 2.2), and a network that was distilled with guidance the guidance scale (Luo et al. 2023, LCM).

        Given as `deep`, this stands in for all the network but those blocks, their skips and the ends (Ma et al. 2023,
        DeepCache, eq. 4). The collection "prompt" may hold what `prompt_keys` makes of `context`, and "rows" what
        `perturbed` or `structured` make.
        """
        emb, context = self.time_features(t, pooled, numbers, guidance), context.astype(self.dtype)
        last = len(self.channels) - 1
        x = self.first(x)
        skips = (x,)
        outermost = self.up(last)
        inner = max(0, outermost.layers - OUTER)
        if deep is None:
            more = Added() if added is None else added
            for i in range(last + 1):
                x, new_skips = self.down(i)(x, emb, context, added=more.stages[i] if more.stages else None)
                skips += new_skips
            x = self.middle()(x, emb, context)
            if more.skips:
                skips = tuple(skip + one.astype(self.dtype) for skip, one in zip(skips, more.skips, strict=True))
            if more.middle is not None:
                x += more.middle.astype(self.dtype)
            for i in range(last):
                layers = self.layers[last - i] + 1
                skips, used = skips[:-layers], skips[-layers:]
                x = self.up(i)(x, emb, context, skips=used, size=(skips[-1].shape[1], skips[-1].shape[2]))
            deep = outermost(x, emb, context, skips=skips, part=range(inner))
        else:
            skips += self.down(0)(x, emb, context, first=outermost.layers - inner - 1)[1]
        if only_deep:
            return deep
        x = outermost(deep, emb, context, skips=skips, part=range(inner, outermost.layers))

        x = GroupNorm(self.groups, self.eps, self.dtype, self.activation, name="conv_norm_out")(x)
        return Conv3x3(self.out_channels, dtype=self.dtype, name="conv_out")(x)

    # The parts, which other networks are made of, too ----------------------------------------------------------------

    def time_features(
        self,
        t: Float[Array, " b"],
        pooled: Float[Array, "b p"] | None = None,
        numbers: Float[Array, "b k"] | None = None,
        guidance: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b d"]:
        """What residual blocks are told: the step, and what the network reads beside it."""
        waves = partial(timestep_embedding, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        width, scales = 4 * self.channels[0], None
        if self.guidance_features is not None:
            assert guidance is not None, "this network reads the guidance scale"
            scales = timestep_embedding(
                1000 * (guidance - 1), self.guidance_features, flip_sin_to_cos=False, freq_shift=1
            ).astype(self.dtype)
        emb = waves(t, self.channels[0]).astype(self.dtype)
        emb = TimestepMLP(width, self.dtype, self.activation, name="time_embedding")(emb, scales)
        if self.embeds_pooled:
            assert pooled is not None, "this network reads a vector"
            emb += TimestepMLP(width, self.dtype, name="class_embedding")(pooled.astype(self.dtype))
        if self.labels is not None:
            assert numbers is not None, "this network reads a label"
            emb += Embed(self.labels, width, self.dtype, name="class_embedding")(numbers[:, 0].astype(jnp.int32))
        if self.number_features is not None:
            assert pooled is not None, "this network reads a vector for the whole prompt"
            assert numbers is not None, "this network reads numbers"
            features = waves(numbers.reshape(-1), self.number_features).reshape(len(t), -1)
            told = jnp.concatenate([pooled.astype(jnp.float32), features], axis=-1).astype(self.dtype)
            emb += TimestepMLP(width, self.dtype, name="add_embedding")(told)
        return emb

    def first(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """The input's features."""
        x = 2 * x - 1 if self.center_input else x
        return Conv3x3(self.channels[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))

    def down(self, i: int) -> DownStage:
        """Stage `i` on the way down."""
        sizes = self._stage(i, self.down_depths[i])
        halves = i < len(self.channels) - 1
        return DownStage(layers=self.layers[i], downsample=halves, name=f"down_blocks_{i}", **sizes)

    def middle(self) -> CrossAttentionMiddle:
        """The stage at the bottom."""
        sizes = self._stage(len(self.channels) - 1, self.mid_depth)
        sizes["only_context"] = False
        return CrossAttentionMiddle(layers=1, divisor=self.mid_divisor, name="mid_block", **sizes)

    def up(self, i: int) -> UpStage:
        """Stage `i` on the way up."""
        level = len(self.channels) - 1 - i
        sizes = self._stage(level, self.up_depths[level])
        return UpStage(layers=self.layers[level] + 1, name=f"up_blocks_{i}", **sizes)

    def _stage(self, level: int, depth: int) -> dict:
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
            "only_context": level < len(self.only_context) and self.only_context[level],
        }


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


def cross_attentions(net: UNet2DConditionModel) -> list[tuple[tuple[str, ...], int]]:
    """Where the params tree has its cross-attentions, and how many channels each has: those on the way down, those on
    the way up, those in the middle."""
    last = len(net.channels) - 1
    stages = [(f"down_blocks_{i}", net.layers[i], net.down_depths[i], i) for i in range(last + 1)]
    stages += [(f"up_blocks_{last - i}", net.layers[i] + 1, net.up_depths[i], i) for i in range(last, -1, -1)]
    stages.append(("mid_block", 1, net.mid_depth, last))
    return [
        ((stage, f"attentions_{j}", f"transformer_blocks_{k}", "attn2"), net.channels[level])
        for stage, layers, depth, level in stages
        for j in range(layers)
        for k in range(depth)
    ]


def with_images(prompts: Params, net: UNet2DConditionModel, images: tuple[Any, ...]) -> Params:
    """The collection "prompt" with keys and values [*b, t, c] of images: for each cross-attention several pairs."""
    out = dict(prompts)
    for (path, _), own in zip(cross_attentions(net), images, strict=True):
        node = out
        for name in path:
            node[name] = dict(node[name])
            node = node[name]
        node["images"] = own
    return out


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
