"""Text to drawings of 128x128 pixels: the UNet of `configs/emoji_gpu.py` on the latents of `configs/emoji128_vae.py`.

Those are 16x16x4 as well, so that a step costs the same.

Hardware: one GPU. Time: 8 minutes. Data: `python -m jaxdiff.tools.prepare emoji --size 128`.
"""

from dataclasses import replace

from configs.emoji_gpu import config as small
from jaxdiff.config import DiffusionTask, TrainConfig


def config() -> TrainConfig:
    """The run `runs/emoji128`."""
    base = small()
    assert isinstance(base.task, DiffusionTask)
    return replace(
        base,
        workdir="runs/emoji128",
        task=replace(base.task, vae="runs/emoji128_vae"),
        data=replace(base.data, size=128),
    )
