"""Every setting, as frozen dataclasses that refuse nonsense when they are made.

The network and scheduler classes carry the field names of the diffusers and transformers `config.json` files, so that a
folder's file and a dataclass are one thing. Nothing here imports more than the standard library.
"""

from jaxdiff.config.base import as_written, from_dict, load_json, naming, nearest, to_dict, to_name
from jaxdiff.config.data import DataConfig
from jaxdiff.config.networks import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    Dinov2Config,
    ImageNormalizerConfig,
    ImageProcessorConfig,
    IPAdapterConfig,
    SchedulerConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from jaxdiff.config.optim import EMAConfig, OptimConfig
from jaxdiff.config.tasks import AdversaryConfig, DiffusionTask, LPIPSConfig, VAETask
from jaxdiff.config.train import DistributedConfig, MeshConfig, TrainConfig

__all__ = [
    "AdversaryConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ControlNetConfig",
    "DataConfig",
    "DiffusionTask",
    "Dinov2Config",
    "DistributedConfig",
    "EMAConfig",
    "IPAdapterConfig",
    "ImageNormalizerConfig",
    "ImageProcessorConfig",
    "LPIPSConfig",
    "MeshConfig",
    "OptimConfig",
    "SchedulerConfig",
    "T2IAdapterConfig",
    "TinyVAEConfig",
    "TrainConfig",
    "UNetConfig",
    "VAEConfig",
    "VAETask",
    "as_written",
    "from_dict",
    "load_json",
    "naming",
    "nearest",
    "to_dict",
    "to_name",
]
