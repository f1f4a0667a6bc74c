"""What is trained, and on which objective."""

from dataclasses import dataclass, field
from typing import Literal

from jaxdiff.config.base import Checked, one_of, positive, require
from jaxdiff.config.networks import CLIPTextConfig, SchedulerConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class LPIPSConfig(Checked):
    """How far apart an image and its copy look to a classifier of photographs (Zhang et al. 2018), as a term of a loss.

    The classifier's weights are those that `python -m jaxdiff.tools.prepare lpips` brings.
    """

    weight: float = 0.0
    """What multiplies the distance; 0 leaves it out."""
    backbone: Literal["alex", "vgg"] = "alex"
    """AlexNet, the metric's own choice, or VGG16, which is the usual one of a loss, at 20 times the work."""
    folder: str = "data/features"
    """Where `prepare` put the weights: DATA_DIR/features."""

    def _check(self) -> None:
        require(self.weight >= 0, f"LPIPSConfig.weight is {self.weight}; it must not be negative.")


@dataclass(frozen=True)
class AdversaryConfig(Checked):
    """A network that learns to tell copies from images, patch by patch, while the decoder learns to deceive it.

    Isola et al. 2017, section 3.2.2; for a first stage Esser et al. 2021, section 3.1. It has no batch norm, which
    would make a copy's verdict depend on the others of its batch, and no other norm: `r1` keeps it in bounds.
    """

    weight: float = 0.0
    """What multiplies the decoder's part, after `adaptive`; 0 trains no adversary."""
    adaptive: bool = True
    """Whether that part is brought to the size of the others, by their gradients at the decoder's last kernel."""
    start: int = 0
    """Updates before the decoder is trained against it. It learns from the first on, so that it has something to say by
    then: latent-diffusion starts both at once, and brings the verdicts of random weights to the size of the rest."""
    loss: Literal["hinge", "softplus"] = "hinge"
    """See `jaxdiff.training.adversary`."""
    r1: float = 0.01
    """What multiplies half the squared gradient of the verdicts at real images (Mescheder et al. 2018)."""
    channels: int = 64
    """Of the first layer; each further one has twice as many, and at most eight times."""
    layers: int = 3
    """Layers of stride 2: with 3 a verdict is of 70 x 70 pixels, with 2 of 34 x 34, with 1 of 16 x 16."""

    def _check(self) -> None:
        for name in ("weight", "start", "r1"):
            require(
                getattr(self, name) >= 0, f"AdversaryConfig.{name} is {getattr(self, name)}; it must not be negative."
            )
        positive(self, "channels", "layers")


@dataclass(frozen=True)
class VAETask(Checked):
    """Trains the autoencoder (Rombach et al. 2022, section 3.1 and appendix G).

    The loss is l1_weight |x - copy| + l2_weight (x - copy)^2 + lpips.weight LPIPS + kl_weight KL, and what `adversary`
    adds. All are means: over pixels and colours, over images, over the latent's values.
    """

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-6
    kl_sums: bool = False
    """Whether `kl_weight` is meant as in latent-diffusion, whose terms are sums over an image and over its latent: then
    it counts times the latent's values over the image's. Of Stable Diffusion's VAE that is 1/48, so that 1e-6 there is
    2.1e-8 of the means here."""
    l1_weight: float = 1.0
    """Share of the absolute error beside the squared one; 0 is best for PSNR, more for sharp edges."""
    l2_weight: float = 1.0
    lpips: LPIPSConfig = field(default_factory=LPIPSConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    init: str = ""
    """A model's folder, a run directory, a VAE's own folder or a single file, whose VAE is the start; empty: random."""
    train_encoder: bool = True
    """False trains the decoder alone: latents, and all that was trained on them, stay as they are."""

    def _check(self) -> None:
        for name in ("kl_weight", "l1_weight", "l2_weight"):
            require(getattr(self, name) >= 0, f"VAETask.{name} is {getattr(self, name)}; it must not be negative.")
        require(
            self.l1_weight + self.l2_weight + self.lpips.weight > 0,
            "VAETask.l1_weight, l2_weight and lpips.weight are all 0: nothing would make copies like their images.",
        )
        require(
            self.train_encoder or bool(self.init),
            "VAETask.train_encoder is False and init is empty: an encoder of "
            "random weights would stay so. Name a folder in init, or train it.",
        )


@dataclass(frozen=True)
class DiffusionTask(Checked):
    """Trains the UNet, and the text encoder or encoders if wanted, on the latents of a frozen VAE."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    text_encoder_2: CLIPTextConfig | None = None
    """Stable Diffusion XL's second one, of a UNet that reads a vector for the whole prompt, and sizes."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    vae: str = ""
    """The trained VAE: a model's folder, a run directory, the VAE's own folder, or a single file."""
    tokenizer: str = ""
    """A folder with `vocab.json` and `merges.txt` or `tokenizer.json`, or a model's that has one."""
    tokenizer_2: str = ""
    """The same for `text_encoder_2`; empty: as `tokenizer` says."""
    init: str = ""
    """Folder, run directory or single file whose UNet and text encoders are the start; empty: random weights."""
    scratch: tuple[str, ...] = ()
    """Of `unet`, `text_encoder` and `text_encoder_2`, those that start from random weights although `init` holds
    them."""
    train_text_encoder: bool = True
    """Whether all text encoders are trained, or none."""
    caption_dropout: float = 0.1
    """Share of captions emptied, so that the model learns the unconditional half of guidance (Ho & Salimans 2022)."""
    zero_empty: bool | None = None
    """Stable Diffusion XL only: whether what the UNet reads of an emptied caption is zeros, and not what the text
    encoders make of the empty text; and so of an empty negative prompt, when the model is sampled. None is as `model`
    says, and without one zeros, as the published model is sampled."""
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
        alone = self.unet == UNetConfig() and self.text_encoder == CLIPTextConfig()
        return not alone or self.text_encoder_2 is not None

    @property
    def text_encoders(self) -> dict[str, CLIPTextConfig]:
        """The text encoders by the names of their folders, in the order in which the UNet reads their features."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder} | second

    @property
    def reads_sizes(self) -> bool:
        """Whether the UNet is Stable Diffusion XL's, which reads a vector for the whole prompt and six numbers, too."""
        return self.text_encoder_2 is not None

    @property
    def zeroes_empty(self) -> bool:
        """`zero_empty`, where that is None by default."""
        return self.reads_sizes and self.zero_empty is not False

    def check_sizes(self) -> None:
        """That the UNet takes what the text encoders give, and nothing else."""
        unet, second = self.unet, self.text_encoder_2
        require(
            unet.time_cond_proj_dim is None,
            f"UNetConfig.time_cond_proj_dim is {unet.time_cond_proj_dim}: the UNet was distilled to read the guidance "
            "scale (LCM); such networks are sampled, and not trained.",
        )
        told = f"UNetConfig.addition_embed_type is {unet.addition_embed_type!r}"
        widths = [text.hidden_size for text in self.text_encoders.values()]
        if second is None:
            require(
                unet.addition_embed_type is None,
                f"{told}, as of Stable Diffusion XL, and there is no text_encoder_2, whose vector such a UNet reads; "
                "name a whole model, or the sizes in DiffusionTask.text_encoder_2.",
            )
            require(
                unet.cross_attention_dim == widths[0],
                f"UNetConfig.cross_attention_dim is {unet.cross_attention_dim} and CLIPTextConfig.hidden_size "
                f"{widths[0]}; they must be equal.",
            )
            require(self.zero_empty is None, f"DiffusionTask.zero_empty is {self.zero_empty}; it is for Stable "
                    "Diffusion XL, here None.")  # fmt: skip
            return
        require(
            unet.addition_embed_type is not None,
            f"{told}, and there is a text_encoder_2: Stable Diffusion XL's UNets have 'text_time'; set it, or leave "
            "text_encoder_2 out.",
        )
        require(
            unet.cross_attention_dim == sum(widths),
            f"UNetConfig.cross_attention_dim is {unet.cross_attention_dim} and the text encoders' hidden_sizes are "
            f"{widths}; it must be their sum.",
        )
        each = unet.addition_time_embed_dim or 0
        require(
            unet.added_features == second.projection_dim + 6 * each,
            f"UNetConfig.projection_class_embeddings_input_dim is {unet.added_features}; with text_encoder_2's "
            f"projection_dim {second.projection_dim} and 6 numbers of addition_time_embed_dim {each} features it must "
            f"be {second.projection_dim + 6 * each}.",
        )
        lengths = self.text_encoder.max_position_embeddings, second.max_position_embeddings
        require(
            lengths[0] == lengths[1],
            f"The text encoders' max_position_embeddings are {lengths[0]} and {lengths[1]}; they must be equal.",
        )

    def _check(self) -> None:
        if self.sized:
            self.check_sizes()
        for name in self.scratch:
            texts = self.text_encoders if self.sized else ("text_encoder", "text_encoder_2")
            one_of("DiffusionTask.scratch", name, ("unet", *texts))
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
