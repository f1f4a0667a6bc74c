"""Stable Diffusion 2.1 trained on at 768x768: v-prediction, OpenCLIP's text encoder (frozen), min-SNR weights.

python train.py configs/sd21_v.py --model models/stable-diffusion-2-1 --data.source folder --data.root images

Mesh: everything in parts over 16 chips (fsdp) of v5e (v5e:4x4), 8 images a chip, norms and activations computed again
in the backward pass. Memory and step bound: `python -m jaxdiff.tools.plan configs/sd21_v.py --topology v5e:4x4`.
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
    """The run `runs/sd21_v`; sizes are SD2.1's, unless `--model` has others; it gives the noise schedule."""
    return TrainConfig(
        workdir="runs/sd21_v",
        model="models/stable-diffusion-2-1",
        task=DiffusionTask(
            unet=UNetConfig(
                sample_size=96,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            ),
            text_encoder=CLIPTextConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
                projection_dim=512,
            ),
            train_text_encoder=False,
            weighting="min_snr",
            latent_variants=4,
        ),
        data=DataConfig(source="prepared", root="prepared", size=768, batch_size=128, crop=0.9, flip=True),
        optim=OptimConfig(lr=1e-5, schedule="constant", b2=0.999),
        ema=EMAConfig(decay=0.9999),
        mesh=MeshConfig(fsdp=16),
        steps=20_000,
        dtype="bfloat16",
        remat="norms",
    )
