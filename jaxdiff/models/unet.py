"""The denoising network of Stable Diffusion (Rombach et al. 2022, section 3.2), named as in diffusers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdiff.nn.blocks import CrossAttentionMiddle, DownStage, UpStage
from jaxdiff.nn.conv import Conv3x3
from jaxdiff.nn.layers import GroupNorm, Remat, TimestepMLP, timestep_embedding
from jaxdiff.types import Context


class UNet2DConditionModel(nn.Module):
    """Predicts noise, velocity or the clean latent from a noisy one, the step number and the prompt's features.

    Each tuple has one entry a level, from the finest. `depths` counts transformer blocks after each residual block on
    the way down and (in the same order of levels) on the way up; 0 is a level without attention, and `mid_depth` is the
    middle's.
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
    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], context: Context
    ) -> Float[Array, "b h w {self.out_channels}"]:
        emb = timestep_embedding(
            t, self.channels[0], flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        ).astype(self.dtype)
        emb = TimestepMLP(4 * self.channels[0], self.dtype, name="time_embedding")(emb)
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
            }

        x = Conv3x3(self.channels[0], dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        skips = (x,)
        for i in range(last + 1):
            down = DownStage(
                layers=self.layers[i], downsample=i < last, name=f"down_blocks_{i}", **stage(i, self.down_depths[i])
            )
            x, new_skips = down(x, emb, context)
            skips += new_skips

        x = CrossAttentionMiddle(layers=1, name="mid_block", **stage(last, self.mid_depth))(x, emb, context)

        for i in range(last + 1):
            level = last - i
            layers = self.layers[level] + 1
            skips, used = skips[:-layers], skips[-layers:]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if level else None
            up = UpStage(layers=layers, name=f"up_blocks_{i}", **stage(level, self.up_depths[level]))
            x = up(x, emb, context, skips=used, size=size)

        x = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="conv_norm_out")(x))
        return Conv3x3(self.out_channels, dtype=self.dtype, name="conv_out")(x)
