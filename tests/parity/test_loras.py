"""Pictures with LoRAs are diffusers' and peft's, and changes of weights are LyCORIS'."""

import numpy as np
import pytest
import torch
import xl
from diffusers import StableDiffusionPipeline
from pairs import TEXTS, nchw
from safetensors.torch import load_file, save_file

import jaxdiff

pytest.importorskip("peft", reason="diffusers reads LoRAs by peft")

UNET_MODULES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "linear_1", "conv_out"]
TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)


@pytest.fixture
def reference(pair, request):
    """diffusers' pipeline of the pair, new for each test, since LoRAs stay in its networks."""
    pipe = StableDiffusionPipeline.from_pretrained(pair.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modules(pipe, convolutions=True):
    """(network, name, weight) of what a LoRA may change."""
    wanted = {"unet": UNET_MODULES + CONVOLUTIONS * convolutions, "text_encoder": TEXT_MODULES}
    for network, ends in wanted.items():
        for name, module in getattr(pipe, network).named_modules():
            if hasattr(module, "weight") and module.weight.ndim > 1 and name.endswith(tuple(f".{e}" for e in ends)):
                yield network, name, module.weight


def low_rank(weight, generator, rank, strength=0.4):
    """Matrices (down, up), as kernels where the weight is one, that change it by about `strength` of itself."""
    down = torch.randn((rank, *weight.shape[1:]), generator=generator) / weight[0].numel() ** 0.5
    up = torch.randn((weight.shape[0], rank, *(1,) * (weight.ndim - 2)), generator=generator)
    return down, up * strength / rank**0.5


def kohya(pipe, generator):
    """LoCon: all modules, of different ranks. One alpha: diffusers 0.42 loses those of attention where they differ."""
    tensors = {}
    for i, (network, name, weight) in enumerate(modules(pipe)):
        prefix = "lora_unet" if network == "unet" else "lora_te"
        if network == "text_encoder" and not name.startswith("text_model."):
            name = f"text_model.{name}"
        rank = (2, 3, 4)[i % 3]
        down, up = low_rank(weight, generator, rank)
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(2.0),
        }
    return tensors


def dotted(unet, text_encoder):
    """Whole names of modules."""

    def make(pipe, generator):
        tensors = {}
        for network, name, weight in modules(pipe, convolutions=False):
            ends = unet if network == "unet" else text_encoder
            for end, half in zip(ends, low_rank(weight, generator, 3), strict=True):
                tensors[f"{network}.{name}.{end}.weight"] = half
        return tensors

    return make


def first(pipe, generator):
    """What diffusers wrote at first: processors, and linear layers of text encoders."""
    tensors = {}
    for network, name, weight in modules(pipe, convolutions=False):
        attention, _, which = name.removesuffix(".0").rpartition(".")
        down, up = low_rank(weight, generator, 3)
        if network == "text_encoder":
            key = f"text_encoder.{name}.lora_linear_layer"
        elif which in ("to_q", "to_k", "to_v", "to_out"):
            key = f"unet.{attention}.processor.{which}_lora"
        else:
            continue
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return tensors


FILES = {
    "kohya": kohya,
    "peft": dotted(("lora_A", "lora_B"), ("lora_A", "lora_B")),
    "diffusers": dotted(("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")),
    "diffusers, at first": first,
}


def draw(pipe, latents, **more):
    return 255 * pipe(TEXTS[:2], num_inference_steps=4, guidance_scale=3.0, latents=nchw(latents), height=16, width=24,
                      output_type="np", **more).images  # fmt: skip


def ours(pair, latents, loras):
    pipe = jaxdiff.Pipeline(pair.ours.with_loras(loras))
    return pipe(TEXTS[:2], steps=4, guidance=3.0, latents=latents).astype(float)


def compare(got, expected, plain, figures, name):
    figures[name] = np.abs(got - expected).max()
    assert np.abs(expected - plain).max() > 10  # the LoRA does something
    assert np.abs(got - expected).max() <= 0.51


@pytest.mark.parametrize("kind", FILES)
def test_pictures_at_every_strength(pair, reference, latents, tmp_path, kind, figures, request):
    plain = draw(reference, latents)
    save_file(FILES[kind](reference, torch.Generator().manual_seed(1)), path := tmp_path / "a.safetensors")
    reference.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    for strength in (1.0, 0.5, -0.4):
        reference.set_adapters(["a"], [strength])
        name = f"{request.node.callspec.id}, strength {strength:g}: largest difference of 255"
        compare(ours(pair, latents, [(path, strength)]), draw(reference, latents), plain, figures, name)
    np.testing.assert_array_equal(ours(pair, latents, [(path, 0)]), ours(pair, latents, []))


def test_two_at_once(pair, reference, latents, tmp_path, figures, request):
    plain = draw(reference, latents)
    loras = []
    for i, kind in enumerate(("kohya", "peft")):
        save_file(FILES[kind](reference, torch.Generator().manual_seed(i)), tmp_path / f"{i}.safetensors")
        loras.append((tmp_path / f"{i}.safetensors", (0.8, -0.4)[i]))
    for i in range(2):
        reference.load_lora_weights(tmp_path, weight_name=f"{i}.safetensors", adapter_name=f"lora{i}")
    reference.set_adapters(["lora0", "lora1"], [0.8, -0.4])
    name = f"{request.node.callspec.id}, two at once: largest difference of 255"
    compare(ours(pair, latents, loras), draw(reference, latents), plain, figures, name)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_what_diffusers_saves_with_its_settings(pair, reference, latents, tmp_path, dora, figures, request):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    plain = draw(reference, latents)
    generator = torch.Generator().manual_seed(3)
    saved = {}
    for network, targets in (("unet", [*UNET_MODULES, "conv1"]), ("text_encoder", TEXT_MODULES)):
        options = (
            {"alpha_pattern": {"to_q": 1}, "rank_pattern": {"to_k": 2}} if network == "unet" else {"use_rslora": True}
        )
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora, **options)
        model = getattr(reference, network)
        inject_adapter_in_model(config, model)
        model.peft_config = {"default": config}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                elif "lora_magnitude" in name:
                    parameter *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
        saved[f"{network}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        saved[f"{network}_lora_adapter_metadata"] = config.to_dict()
    try:
        StableDiffusionPipeline.save_lora_weights(tmp_path, **saved)
    except TypeError:  # sets are no JSON
        for network in ("unet", "text_encoder"):
            values = saved[f"{network}_lora_adapter_metadata"]
            values["target_modules"] = sorted(values["target_modules"])
        StableDiffusionPipeline.save_lora_weights(tmp_path, **saved)
    expected = draw(reference, latents)
    name = f"{request.node.callspec.id}, saved by diffusers: largest difference of 255"
    compare(ours(pair, latents, [tmp_path / "pytorch_lora_weights.safetensors"]), expected, plain, figures, name)


PRESET = {"unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
          "target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]}  # fmt: skip
# What it is: a tensor that it has, and arguments.
ALGORITHMS = {
    "LoCon": ("lora_up.weight", {"algo": "locon"}),
    "LoCon, Tucker": ("lora_mid.weight", {"algo": "locon", "use_tucker": True}),
    "LoHa": ("hada_w1_a", {"algo": "loha"}),
    "LoHa, Tucker": ("hada_t1", {"algo": "loha", "use_tucker": True}),
    "LoKr": ("lokr_w2_a", {"algo": "lokr", "factor": 4}),
    "LoKr, both products": ("lokr_w1_a", {"algo": "lokr", "factor": 8, "decompose_both": True}),
    "LoKr, whole": ("lokr_w2", {"algo": "lokr", "factor": 4, "full_matrix": True}),
    "LoKr, Tucker": ("lokr_t2", {"algo": "lokr", "factor": 2, "use_tucker": True}),
    "full": ("diff_b", {"algo": "full"}),
    "IA3": ("on_input", {"algo": "ia3"}),
    "DoRA": ("dora_scale", {"algo": "locon", "dora_wd": True}),
    "DoRA, inputs": ("dora_scale", {"algo": "locon", "dora_wd": True, "wd_on_output": False}),
    "DoRA of LoHa": ("dora_scale", {"algo": "loha", "dora_wd": True}),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_kinds_of_lycoris(sd1, latents, tmp_path, algorithm, figures):
    tensor, options = ALGORITHMS[algorithm]
    lycoris = pytest.importorskip("lycoris")
    reference = StableDiffusionPipeline.from_pretrained(sd1.path)
    reference.set_progress_bar_config(disable=True)
    plain = draw(reference, latents)
    network_class = lycoris.LycorisNetwork
    network_class.apply_preset(PRESET)
    network_class.LORA_PREFIX = "lora_unet"
    torch.manual_seed(0)
    sizes = {"linear_dim": 3, "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 4}
    network = lycoris.create_lycoris(reference.unet, 1.0, **sizes, train_norm=True, **options)
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape)
            elif name.endswith(("norm", "_norm")) or options["algo"] in ("full", "ia3"):
                parameter += 0.1 * torch.randn(parameter.shape)
            else:
                parameter += 0.2 * torch.randn(parameter.shape)
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    assert {tensor, "w_norm", "b_norm"} <= {name.partition(".")[2] for name in tensors}
    save_file(tensors, path := tmp_path / "a.safetensors")
    expected = draw(reference, latents)
    compare(ours(sd1, latents, [path]), expected, plain, figures, f"LyCORIS, {algorithm}: largest difference of 255")


def kohya_xl(pipe, generator):
    """kohya's names for Stable Diffusion XL: the denoiser's in the original layout, and both text encoders."""
    from jaxdiff.io import ldm

    table = ldm.unet_table((1, 1, 1), (True, True, False))
    prefixes = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = {}
    for network in ("unet", *prefixes):
        for name, module in getattr(pipe, network).named_modules():
            ends = UNET_MODULES if network == "unet" else TEXT_MODULES
            if not hasattr(module, "weight") or not name.endswith(tuple(f".{end}" for end in ends)):
                continue
            if network == "unet":
                key = f"lora_unet_{ldm.translate(name, table)}"
            else:
                key = f"{prefixes[network]}_{name if name.startswith('text_model.') else f'text_model.{name}'}"
            down, up = low_rank(module.weight, generator, 3)
            key = key.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    return tensors


def test_stable_diffusion_xl(latents, tmp_path, figures):
    reference, own = xl.base(tmp_path), jaxdiff.load(tmp_path / "model")
    plain = draw(reference, latents)
    save_file(kohya_xl(reference, torch.Generator().manual_seed(1)), path := tmp_path / "a.safetensors")
    assert any("lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_k" in name for name in load_file(path))
    reference.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    for strength in (1.0, 0.5, -1.0):
        reference.set_adapters(["a"], [strength])
        expected = draw(reference, latents)
        pipe = jaxdiff.Pipeline(own.model.with_loras([(path, strength)]))
        got = pipe(TEXTS[:2], steps=4, guidance=3.0, latents=latents).astype(float)
        compare(got, expected, plain, figures, f"SDXL, kohya, strength {strength:g}: largest difference of 255")
