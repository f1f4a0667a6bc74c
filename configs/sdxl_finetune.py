"""Stable Diffusion XL trained on at 1024x1024 and its kin of other aspects, on images of your own.

python train.py configs/sdxl_finetune.py --model models/sdxl --data.source folder --data.root images

The text encoders are frozen, and read captions at every step. The UNet is told the size of each image before it was
resized, and where it was cut. Latents are cached in `--cache`; crops at random need `--task.latent_variants` above 1.

Mesh: everything in parts over 16 chips (fsdp), such as v5e:4x4, 2 images a chip, blocks computed again in the backward
pass. Each chip holds 0.6 GiB of parameters, 1.2 of the optimiser, 0.6 of the average and 0.2 of the text encoders, and
computes 56 TFLOP a step, which takes v5e at least 286 ms. Temporaries, and so whether it fits, are not measured yet:
`python -m jaxdiff.tools.plan configs/sdxl_finetune.py --topology v5e:4x4` tells, with more than 14 GB of memory.
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
    """The run `runs/sdxl_finetune`; sizes are SDXL's, unless `--model` has others; it gives the noise schedule."""
    return TrainConfig(
        workdir="runs/sdxl_finetune",
        model="models/sdxl",
        task=DiffusionTask(
            unet=UNetConfig(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            text_encoder=CLIPTextConfig(),
            text_encoder_2=CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
            ),
            train_text_encoder=False,
            latent_variants=1,
            guidance=5.0,
        ),
        data=DataConfig(
            source="prepared",
            root="prepared",
            size=1024,
            aspects=("1:1", "9:7", "7:9", "19:13", "13:19", "7:4", "4:7"),
            batch_size=32,
        ),
        optim=OptimConfig(lr=1e-5, schedule="constant", b2=0.999, warmup_steps=500),
        ema=EMAConfig(decay=0.9999),
        mesh=MeshConfig(fsdp=16),
        steps=20_000,
        dtype="bfloat16",
        remat="blocks",
    )
