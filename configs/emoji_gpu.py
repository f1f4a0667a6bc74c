"""The embedded model on one GPU: `configs/emoji.py` with large batches that lie on the device, and Muon.

Hardware: one GPU of 16 GB or more. Time: 8 minutes of training, and two to compile and to encode the drawings.
From the embedded model: --task.init jaxdiff/assets/emoji --task.vae jaxdiff/assets/emoji
"""

from dataclasses import replace

from configs.emoji import EMBEDDINGS
from configs.emoji import config as on_cpu
from jaxdiff.config import DiffusionTask, OptimConfig, TrainConfig


def config() -> TrainConfig:
    """The run `runs/emoji_gpu`."""
    base = on_cpu()
    assert isinstance(base.task, DiffusionTask)
    return replace(
        base,
        workdir="runs/emoji_gpu",
        task=replace(base.task, latent_variants=12),
        data=replace(base.data, batch_size=512, resident=True, workers=8),
        # Liu et al. 2025's scale makes AdamW's rates fit Muon's matrices.
        optim=OptimConfig(
            name="muon", lr=1e-3, b1=0.95, b2=0.99, warmup_steps=500, final_lr_share=0.01, rates=(EMBEDDINGS,)
        ),
        dtype="bfloat16",
        seconds=8 * 60.0,
        steps_per_call=50,
        log_every=50,
        eval_every=4000,
        checkpoint_every=1000,
    )
