"""An autoencoder small enough to be trained in a test."""

from jaxdiff.config import DataConfig, OptimConfig, TrainConfig, VAEConfig, VAETask


def config() -> TrainConfig:
    """A run of a few seconds; tests give `--workdir` and `--data.root`."""
    return TrainConfig(
        workdir="runs/tiny_vae",
        task=VAETask(
            vae=VAEConfig(
                sample_size=16,
                down_block_types=("DownEncoderBlock2D",),
                up_block_types=("UpDecoderBlock2D",),
                block_out_channels=(8,),
                layers_per_block=1,
                norm_num_groups=2,
            )
        ),
        data=DataConfig(source="emoji", root="tests/data", size=16, batch_size=8, flip=True),
        optim=OptimConfig(lr=1e-3, warmup_steps=5),
        steps=60,
        log_every=1,
        eval_every=1000,
        checkpoint_every=2,
    )
