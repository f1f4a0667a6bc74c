"""What is trained, and on which objective."""

from dataclasses import dataclass, field

from jaxdiff.config.base import Checked, require
from jaxdiff.config.networks import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class VAETask(Checked):
    """Trains the autoencoder: an L1 + L2 reconstruction and a small KL term (Rombach et al. 2022, section 3.1)."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-6
    l1_weight: float = 1.0
    """Share of the absolute error beside the squared one; 0 is best for PSNR, more for sharp edges."""
    init: str = ""
    """Folder or run directory whose VAE is the start; empty starts from random weights."""
    train_encoder: bool = True
    """False trains the decoder alone: latents, and all that was trained on them, stay as they are."""

    def _check(self) -> None:
        for name in ("kl_weight", "l1_weight"):
            require(getattr(self, name) >= 0, f"VAETask.{name} is {getattr(self, name)}; it must not be negative.")
        require(
            self.train_encoder or bool(self.init),
            "VAETask.train_encoder is False and init is empty: an encoder of "
            "random weights would stay so. Name a folder in init, or train it.",
        )


@dataclass(frozen=True)
class DiffusionTask(Checked):
    """Trains the UNet, and the text encoder if wanted, on the latents of a frozen VAE."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    vae: str = ""
    """Folder or run directory that holds the trained VAE (and, for a folder, the weights to start from: see `init`)."""
    tokenizer: str = ""
    """Folder with `vocab.json` and `merges.txt` or `tokenizer.json`."""
    init: str = ""
    """Folder or run directory whose UNet and text encoder are the start; empty starts from random weights."""
    train_text_encoder: bool = True
    caption_dropout: float = 0.1
    """Share of captions emptied, so that the model learns the unconditional half of guidance (Ho & Salimans 2022)."""
    min_snr_gamma: float | None = None
    """Cap on the loss's signal-to-noise weight (Hang et al. 2023); None weighs all noise levels alike."""
    latent_variants: int = 0
    """Latents encoded once for so many augmentations of each picture, before training; 0 encodes at every step."""
    prompts: tuple[str, ...] = ()
    """Drawn at every evaluation, with seeds 0, 1, ...; empty draws captions of the training data."""

    def _check(self) -> None:
        require(
            self.unet.cross_attention_dim == self.text_encoder.hidden_size,
            f"UNetConfig.cross_attention_dim is {self.unet.cross_attention_dim} and CLIPTextConfig.hidden_size "
            f"{self.text_encoder.hidden_size}; they must be equal.",
        )
        require(
            self.train_text_encoder or bool(self.init),
            "DiffusionTask.train_text_encoder is False and init is empty: "
            "a text encoder of random weights would stay so. Name a folder in init, or train it.",
        )
        require(
            0 <= self.caption_dropout <= 1,
            f"DiffusionTask.caption_dropout is {self.caption_dropout}; it must lie in [0, 1].",
        )
        require(
            self.min_snr_gamma is None or self.min_snr_gamma > 0,
            f"DiffusionTask.min_snr_gamma is {self.min_snr_gamma}; it must be above 0, or None.",
        )
        require(
            self.latent_variants >= 0,
            f"DiffusionTask.latent_variants is {self.latent_variants}; it must not be negative.",
        )
