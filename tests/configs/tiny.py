"""A text-to-image model small enough to be trained in a test, on the autoencoder of `tiny_vae.py`."""

from jaxdiff.config import (
    CLIPTextConfig,
    DataConfig,
    DiffusionTask,
    OptimConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
)


def config() -> TrainConfig:
    """A run of a few seconds; tests give the folders."""
    return TrainConfig(
        workdir="runs/tiny",
        task=DiffusionTask(
            unet=UNetConfig(
                sample_size=16,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=16,
                norm_num_groups=4,
                use_linear_projection=True,
            ),
            text_encoder=CLIPTextConfig(
                vocab_size=600,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=12,
                projection_dim=16,
                bos_token_id=598,
                eos_token_id=599,
                pad_token_id=599,
            ),
            scheduler=SchedulerConfig(
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
                steps_offset=1,
                clip_sample=False,
            ),
            vae="runs/tiny_vae",
            tokenizer="runs/tokenizer",
            latent_variants=1,
            prompts=("a red apple", "a dog"),
            heldout=4,
        ),
        data=DataConfig(source="emoji", root="tests/data", size=16, batch_size=8),
        optim=OptimConfig(lr=3e-3, warmup_steps=5),
        steps=8,
        log_every=2,
        eval_every=4,
        checkpoint_every=4,
    )
