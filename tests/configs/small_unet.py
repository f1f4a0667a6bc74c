"""A UNet of 37 million parameters on cached latents and captions: what the memory of a step is measured on."""

from jaxdiff.config import CLIPTextConfig, DataConfig, DiffusionTask, SchedulerConfig, TrainConfig, UNetConfig


def config() -> TrainConfig:
    """A plan; there is no data to run it on."""
    return TrainConfig(
        workdir="runs/small_unet",
        model="models/none",
        task=DiffusionTask(
            unet=UNetConfig(sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=768),
            text_encoder=CLIPTextConfig(),
            scheduler=SchedulerConfig(),
            train_text_encoder=False,
            latent_variants=1,
            text_variants=1,
        ),
        data=DataConfig(size=256, batch_size=8),
    )
