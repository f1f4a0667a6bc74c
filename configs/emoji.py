"""The embedded model: text to 64x64 emoji, on the latents of `configs/emoji_vae.py`, drawn by the
decoder of `configs/emoji_decoder.py`.

Hardware: 2 CPU cores. Time: 45 minutes. Small batches, since steps and not images limit so short a run; with a GPU take
`configs/emoji_gpu.py`. docs/training-the-embedded-model.md has what was tried.
"""

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

PROMPTS = (
    "a red apple, noto style, on a blue background",
    "a dog, 3d style, on a green background",
    "grinning face, flat style, on a white background",
    "a cat, blob style, on a purple background",
    "pizza, gradient style, on a cyan background",
    "an airplane, high contrast style, on a yellow background",
    "red heart, noto style, on a black background",
    "a tree, 3d style, on an orange background",
    "a house, noto style, on a pink background",
    "a fish, flat style, on a grey background",
    "a star, 3d style, on a red background",
    "a red apple",
    "a dog",
    "a car on a brown background",
    "a flower, noto style",
    "a smiling face with sunglasses",
)


EMBEDDINGS = ".*/token_embedding/embedding=5"
"""A concept has about five drawings: few updates for the rows of its words, each of the size of the rate."""


def config() -> TrainConfig:
    """The run `runs/emoji`."""
    return TrainConfig(
        workdir="runs/emoji",
        task=DiffusionTask(
            unet=UNetConfig(
                sample_size=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(64, 128, 160),
                layers_per_block=1,
                attention_head_dim=(2, 4, 5),
                cross_attention_dim=160,
                use_linear_projection=True,
            ),
            text_encoder=CLIPTextConfig(
                vocab_size=4096,
                hidden_size=160,
                intermediate_size=640,
                num_hidden_layers=3,
                num_attention_heads=5,
                max_position_embeddings=32,
                projection_dim=160,
                bos_token_id=4094,
                eos_token_id=4095,
                pad_token_id=4095,
            ),
            # Velocity with a last step that is pure noise: plain backgrounds need their mean to come from the prompt.
            scheduler=SchedulerConfig(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                steps_offset=1,
                set_alpha_to_one=False,
                clip_sample=False,
                rescale_betas_zero_snr=True,
            ),
            vae="runs/emoji_decoder",
            tokenizer="jaxdiff/assets/emoji/tokenizer",
            latent_variants=6,
            prompts=PROMPTS,
            guidance=3.0,
        ),
        data=DataConfig(source="emoji", root="data", size=64, batch_size=32, heldout="test"),
        optim=OptimConfig(
            lr=5e-4, warmup_steps=300, b2=0.99, weight_decay=0.01, final_lr_share=0.02, rates=(EMBEDDINGS,)
        ),
        seconds=45 * 60.0,
        ema=EMAConfig(profile="power", widths=(0.05, 0.1)),
        log_every=25,
        eval_every=1000,
        checkpoint_every=250,
    )
