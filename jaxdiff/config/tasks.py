"""What is trained, and on which objective."""

from dataclasses import dataclass, field
from typing import Literal

from jaxdiff.config.base import Checked, one_of, positive, require
from jaxdiff.config.networks import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class VAETask(Checked):
    """Trains the autoencoder: an L1 + L2 reconstruction and a small KL term (Rombach et al. 2022, section 3.1)."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-6
    l1_weight: float = 1.0
    """Share of the absolute error beside the squared one; 0 is best for PSNR, more for sharp edges."""
    init: str = ""
    """A model's folder, a run directory, a VAE's own folder or a single file, whose VAE is the start; empty: random."""
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
    """The trained VAE: a model's folder, a run directory, the VAE's own folder, or a single file."""
    tokenizer: str = ""
    """A folder with `vocab.json` and `merges.txt` or `tokenizer.json`, or a model's that has one."""
    init: str = ""
    """Folder, run directory or single file whose UNet and text encoder are the start; empty: random weights."""
    scratch: tuple[str, ...] = ()
    """Of `unet` and `text_encoder`, those that start from random weights although `init` holds them."""
    train_text_encoder: bool = True
    caption_dropout: float = 0.1
    """Share of captions emptied, so that the model learns the unconditional half of guidance (Ho & Salimans 2022)."""
    weighting: Literal["none", "min_snr", "debiased", "edm"] = "none"
    """How much each noise level counts; see `jaxdiff.diffusion.weights`."""
    min_snr_gamma: float = 5.0
    """Cap of min_snr's weight (Hang et al. 2023)."""
    sigma_data: float = 1.0
    """Standard deviation of the data in edm's weight (Karras et al. 2022); scaled latents have 1."""
    timesteps: Literal["uniform", "logit_normal", "importance"] = "uniform"
    """Which noise levels are drawn; see `jaxdiff.diffusion.timesteps`."""
    logit_mean: float = 0.0
    """Of logit_normal; above 0 draws more noise (Esser et al. 2024, section 3.1)."""
    logit_std: float = 1.0
    noise_offset: float = 0.0
    """Size of the constant added to each channel's noise, for darker and brighter images; 0.05 to 0.1 is usual."""
    latent_variants: int = 0
    """Latents encoded once for so many augmentations of each image, before training; 0 encodes at every step."""
    text_variants: int = 0
    """Captions drawn, and encoded once by a frozen text encoder, for each of these latents; 0 encodes at every step."""
    prompts: tuple[str, ...] = ()
    """Drawn at every evaluation, with seeds 0, 1, ...; empty draws captions of the training data."""
    heldout: int = 32
    """Images on which every evaluation measures the error of the guess (`jaxdiff.evaluation.denoising`), of the split
    `DataConfig.heldout` where there is one, else of the data; 0 measures none."""
    guidance: float | None = None
    """The guidance scale that the exported model is sampled with where a user gives none; None is 7.5."""

    @property
    def sized(self) -> bool:
        """Whether any network's size is named; where none is, `TrainConfig.model` gives them."""
        return self.unet != UNetConfig() or self.text_encoder != CLIPTextConfig()

    def check_sizes(self) -> None:
        """That the UNet takes what the text encoder gives, and nothing else."""
        added = self.unet.addition_embed_type or self.unet.time_cond_proj_dim
        require(
            added is None,
            f"The UNet reads more than a prompt ({added!r} of addition_embed_type and time_cond_proj_dim), as that of "
            "Stable Diffusion XL; such networks are sampled, and not trained.",
        )
        require(
            self.unet.cross_attention_dim == self.text_encoder.hidden_size,
            f"UNetConfig.cross_attention_dim is {self.unet.cross_attention_dim} and CLIPTextConfig.hidden_size "
            f"{self.text_encoder.hidden_size}; they must be equal.",
        )

    def _check(self) -> None:
        if self.sized:
            self.check_sizes()
        for name in self.scratch:
            one_of("DiffusionTask.scratch", name, ("unet", "text_encoder"))
        require(
            0 <= self.caption_dropout <= 1,
            f"DiffusionTask.caption_dropout is {self.caption_dropout}; it must lie in [0, 1].",
        )
        positive(self, "min_snr_gamma", "sigma_data", "logit_std")
        require(self.noise_offset >= 0, f"DiffusionTask.noise_offset is {self.noise_offset}; it must not be negative.")
        require(
            self.latent_variants >= 0,
            f"DiffusionTask.latent_variants is {self.latent_variants}; it must not be negative.",
        )
        require(self.heldout >= 0, f"DiffusionTask.heldout is {self.heldout}; it must not be negative.")
        require(
            self.text_variants >= 0, f"DiffusionTask.text_variants is {self.text_variants}; it must not be negative."
        )
        require(
            not self.text_variants or (self.latent_variants > 0 and not self.train_text_encoder),
            f"DiffusionTask.text_variants is {self.text_variants}, which keeps encoded captions beside cached latents: "
            "it needs latent_variants, and train_text_encoder False.",
        )
