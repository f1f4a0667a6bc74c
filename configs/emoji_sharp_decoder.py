"""The embedded model's decoder, trained on against LPIPS and an adversary: sharper copies, the same latents.

python -m jaxdiff.tools.prepare lpips; python train.py configs/emoji_sharp_decoder.py

Hardware: 2 CPU cores.
"""

from jaxdiff.config import (
    AdversaryConfig,
    DataConfig,
    EMAConfig,
    LPIPSConfig,
    OptimConfig,
    TrainConfig,
    VAEConfig,
    VAETask,
)


def config() -> TrainConfig:
    """The run `runs/emoji_sharp_decoder`."""
    return TrainConfig(
        workdir="runs/emoji_sharp_decoder",
        task=VAETask(
            vae=VAEConfig(
                sample_size=64,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(32, 48, 96),
                layers_per_block=1,
                norm_num_groups=16,
            ),
            l2_weight=0.0,
            lpips=LPIPSConfig(weight=0.5),
            adversary=AdversaryConfig(weight=0.5, start=200, channels=32, layers=2),
            init="jaxdiff/assets/emoji",
            train_encoder=False,
        ),
        data=DataConfig(source="emoji", root="data", size=64, batch_size=16, flip=True),
        optim=OptimConfig(lr=5e-4, warmup_steps=50, b1=0.5, b2=0.9, weight_decay=0.0, final_lr_share=0.02),
        steps=2000,
        ema=EMAConfig(decay=0.998),
        log_every=25,
        eval_every=250,
        checkpoint_every=250,
    )
