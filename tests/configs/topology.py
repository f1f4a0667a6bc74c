"""A text-to-image model small enough to be trained on every topology of a test, on the embedded model's autoencoder."""

from jaxdiff.config import (
    CLIPTextConfig,
    DataConfig,
    DiffusionTask,
    EMAConfig,
    OptimConfig,
    SchedulerConfig,
    TrainConfig,
    UNetConfig,
)


def config() -> TrainConfig:
    """A run of a few seconds; tests give `--workdir`."""
    return TrainConfig(
        workdir="runs/topology",
        task=DiffusionTask(
            unet=UNetConfig(
                sample_size=4,
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
                vocab_size=4096,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                projection_dim=16,
                bos_token_id=4094,
                eos_token_id=4095,
                pad_token_id=4095,
            ),
            scheduler=SchedulerConfig(prediction_type="v_prediction", clip_sample=False),
            vae="jaxdiff/assets/emoji",
            tokenizer="jaxdiff/assets/emoji/tokenizer",
            caption_dropout=0.3,
            latent_variants=1,
            prompts=("a dog",),
            heldout=0,
        ),
        data=DataConfig(source="emoji", root="tests/data", size=16, batch_size=8, flip=True, crop=0.8),
        # The gradient of a key's bias is zero but for rounding, which a small eps would blow up to whole steps.
        optim=OptimConfig(lr=1e-3, warmup_steps=2, eps=1e-4),
        ema=EMAConfig(decay=0.0),  # so that what is exported are the parameters
        steps=6,
        log_every=1,
        eval_every=1000,
        checkpoint_every=3,
    )
