"""Stable Diffusion 1.5's UNet from random weights at 512x512, on its own autoencoder and text encoder, both frozen.

python train.py configs/sd15_scratch.py --model models/stable-diffusion-v1-5 --data.root prepared

Mesh: parameters, optimiser and averages in parts over 16 chips (fsdp), the batch over all of them; 256 chips of v5e
(v5e:16x16), 8 images a chip. By `python -m jaxdiff.tools.plan configs/sd15_scratch.py --topology v5e:4x4 --batch 8`,
16 of these chips with 8 images each take 9.6 of 15.75 GiB (8.8 GiB of them temporaries), 19.9 TFLOP and 217 GiB of
memory traffic: at the least 101 ms a step for the operations and 285 ms for the traffic (attention in loops, before
its kernels). Latents are cached in `--cache`, a folder that all hosts share.
"""

from jaxdiff.config import (
    CLIPTextConfig,
    DataConfig,
    DiffusionTask,
    EMAConfig,
    MeshConfig,
    OptimConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
)


def config() -> TrainConfig:
    """The run `runs/sd15_scratch`; sizes are SD1.5's, unless `--model` has others; the noise schedule is SD1.5's."""
    return TrainConfig(
        workdir="runs/sd15_scratch",
        model="models/stable-diffusion-v1-5",
        task=DiffusionTask(
            unet=UNetConfig(cross_attention_dim=768),
            text_encoder=CLIPTextConfig(),
            scheduler=SchedulerConfig(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                set_alpha_to_one=False,
                clip_sample=False,
            ),
            scratch=("unet",),
            train_text_encoder=False,
            latent_variants=1,
        ),
        data=DataConfig(source="prepared", root="prepared", size=512, batch_size=2048, crop=0.9, workers=8),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=10_000, b2=0.999),
        ema=EMAConfig(decay=0.9999),
        mesh=MeshConfig(fsdp=16),
        steps=250_000,
        dtype="bfloat16",
        log_every=100,
        eval_every=5000,
        checkpoint_every=1000,
    )
