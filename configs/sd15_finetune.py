"""Stable Diffusion 1.5 trained on at 512x512 on images of your own; its text encoder learns at a tenth of the rate.

python train.py configs/sd15_finetune.py --model models/stable-diffusion-v1-5 --data.source folder --data.root images

Mesh: everything in parts over 16 chips (fsdp) of v5e (v5e:4x4), 16 images a chip, blocks computed again in the
backward pass. The UNet's step takes 10.5 of 15.75 GiB (9.6 GiB of them temporaries), and at the least 248 ms for its
operations and 818 ms for its memory traffic (with attention in loops, before its kernels). What the text encoder adds,
and any other slice or batch, is told by `python -m jaxdiff.tools.plan configs/sd15_finetune.py --topology v5e:4x4`.
Latents are cached in `--cache`.
"""

from jaxdiff.config import (
    CLIPTextConfig,
    DataConfig,
    DiffusionTask,
    EMAConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    UNetConfig,
)


def config() -> TrainConfig:
    """The run `runs/sd15_finetune`; sizes are SD1.5's, unless `--model` has others; it gives the noise schedule."""
    return TrainConfig(
        workdir="runs/sd15_finetune",
        model="models/stable-diffusion-v1-5",
        task=DiffusionTask(
            unet=UNetConfig(cross_attention_dim=768),
            text_encoder=CLIPTextConfig(),
            weighting="min_snr",
            latent_variants=4,
        ),
        data=DataConfig(source="prepared", root="prepared", size=512, batch_size=256, crop=0.9, flip=True),
        optim=OptimConfig(lr=1e-5, schedule="constant", b2=0.999, rates=("text_encoder/.*=0.1",)),
        ema=EMAConfig(decay=0.9999),
        mesh=MeshConfig(fsdp=16),
        steps=20_000,
        dtype="bfloat16",
        remat="blocks",
    )
