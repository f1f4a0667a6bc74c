"""An autoencoder for drawings of 128x128 pixels: factor 8, to latents of 16x16x4, as those of 64x64 are.

Hardware: one GPU. Time: 3 minutes.
"""

from jaxdiff.config import DataConfig, EMAConfig, OptimConfig, TrainConfig, VAEConfig, VAETask


def config() -> TrainConfig:
    """The run `runs/emoji128_vae`."""
    return TrainConfig(
        workdir="runs/emoji128_vae",
        task=VAETask(
            vae=VAEConfig(
                sample_size=128,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(32, 48, 96, 128),
                layers_per_block=1,
                norm_num_groups=16,
            ),
            kl_weight=1e-5,
        ),
        data=DataConfig(source="emoji", root="data", size=128, batch_size=64, flip=True, resident=True, workers=4),
        optim=OptimConfig(lr=1e-3, warmup_steps=200, b2=0.99, weight_decay=0.01, final_lr_share=0.01),
        dtype="bfloat16",
        seconds=3 * 60.0,
        steps_per_call=10,
        ema=EMAConfig(profile="power", widths=(0.05, 0.1)),
        log_every=50,
        eval_every=1000,
        checkpoint_every=500,
    )
