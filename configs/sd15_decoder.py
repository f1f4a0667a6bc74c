"""The decoder of Stable Diffusion 1.5's autoencoder, trained on at 256x256 on images of your own; latents stay valid.

python -m jaxdiff.tools.prepare lpips
python train.py configs/sd15_decoder.py --task.init models/stable-diffusion-v1-5 --data.source folder --data.root images

After Stability AI's ft-MSE decoder, which was trained on 256 pixels at batch 192 with the squared error and a tenth of
LPIPS, with an adversary in addition. It has not been run.
"""

from jaxdiff.config import (
    AdversaryConfig,
    DataConfig,
    EMAConfig,
    LPIPSConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
    VAETask,
)


def config() -> TrainConfig:
    """The run `runs/sd15_decoder`; sizes are SD1.5's."""
    return TrainConfig(
        workdir="runs/sd15_decoder",
        task=VAETask(
            l1_weight=0.0,
            lpips=LPIPSConfig(weight=0.1, backbone="vgg"),
            adversary=AdversaryConfig(weight=0.1, start=5_000),
            init="models/stable-diffusion-v1-5",
            train_encoder=False,
        ),
        data=DataConfig(source="prepared", root="prepared", size=256, batch_size=192, crop=0.9, flip=True),
        optim=OptimConfig(lr=1e-5, schedule="constant", warmup_steps=1_000, b1=0.5, b2=0.9, weight_decay=0.0),
        ema=EMAConfig(decay=0.9999),
        mesh=MeshConfig(fsdp=16),
        steps=50_000,
        dtype="bfloat16",
        remat="blocks",
    )
