"""Models in one file: sizes are found from shapes, files go there and back bit for bit, and others are told."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tyro
from safetensors.numpy import load_file, save_file
from test_convert import SD1, SD2, published

import jaxdiff
from jaxdiff import build
from jaxdiff.config import CLIPTextConfig, DiffusionTask, SchedulerConfig, TrainConfig, VAEConfig
from jaxdiff.io import ldm
from jaxdiff.io.folder import UNMAPPED, find_part, model_schedule, read_config, read_network
from jaxdiff.io.single_file import SingleFile, open_single, write_single
from jaxdiff.io.weights import open_safetensors, read_metadata
from jaxdiff.model import FileOptions, Model, read_model
from jaxdiff.runtime.cli import exit_code
from jaxdiff.tools import convert
from jaxdiff.training.options import resolve
from jaxdiff.training.parts import read_part, read_tokenizers

BETAS = SchedulerConfig(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
    clip_sample=False,
)  # fmt: skip
# As small as the layouts allow, which have groups of 32 and heads of 64 channels.
VAE = VAEConfig(
    sample_size=128, block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
)  # fmt: skip
LIKE_SD1 = {
    "denoiser": replace(tiny.UNET, sample_size=64, block_out_channels=(32, 64), attention_head_dim=8,
                        norm_num_groups=32, cross_attention_dim=64),
    "vae": VAE,
    "text_encoder": CLIPTextConfig(vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                   num_attention_heads=1, max_position_embeddings=24, projection_dim=64,
                                   bos_token_id=598, eos_token_id=599),
}  # fmt: skip
LIKE_SD2 = LIKE_SD1 | {
    "denoiser": replace(LIKE_SD1["denoiser"], sample_size=96, block_out_channels=(64, 128), attention_head_dim=(1, 2),
                        use_linear_projection=True),
    "vae": replace(VAE, sample_size=192),
    "text_encoder": replace(LIKE_SD1["text_encoder"], hidden_act="gelu"),
}  # fmt: skip
FOLDERS = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder"}


def named(model: Model) -> dict:
    return {FOLDERS[role]: network for role, network in model.networks.items()}


def average(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {
        "sd1": tiny.model(BETAS, **LIKE_SD1),
        "sd2": tiny.model(replace(BETAS, prediction_type="v_prediction"), **LIKE_SD2),
    }


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> dict[str, Path]:
    """Files as the original code would have saved them: with buffers, averages and the rest of the text tower."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(7)
    out = {}
    for name, model in models.items():
        write_single(folder / "bare.safetensors", named(model), model.scheduler)
        tensors = load_file(folder / "bare.safetensors")
        unet = {key: array for key, array in tensors.items() if key.startswith("model.diffusion_model.")}
        tensors |= {average(key): array + 1 for key, array in unet.items()}
        tensors |= {"model_ema.decay": np.array(0.9999, np.float32), "model_ema.num_updates": np.array(7, np.int32)}
        tensors |= {"betas": np.ones(1000), "alphas_cumprod": np.ones(1000, np.float32)}
        if name == "sd1":
            tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(24)[None]
        else:
            blocks = "cond_stage_model.model.transformer.resblocks"
            last = {key: array for key, array in tensors.items() if key.startswith(f"{blocks}.1.")}
            tensors |= {key.replace(f"{blocks}.1", f"{blocks}.2"): array + 1 for key, array in last.items()}
            tensors["cond_stage_model.model.text_projection"] = rng.normal(size=(64, 64)).astype(np.float32)
            tensors["cond_stage_model.model.logit_scale"] = np.array(4.6, np.float32)
        out[name] = folder / f"{name}.safetensors"
        save_file(tensors, out[name])
    return out


@pytest.fixture(scope="module")
def tokenizer(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    models["sd1"].tokenizer.save(folder)
    return folder


def run(*words: object) -> int:
    return exit_code(lambda: convert.main(tyro.cli(convert.Args, args=[str(word) for word in words])))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert (array.dtype, array.shape) == (b[name].dtype, b[name].shape), name
        assert array.tobytes() == b[name].tobytes(), name


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_the_table_gives_every_published_tensor_a_name_of_its_own_and_takes_it_back(model):
    configs = SD1 if model == "sd1" else SD2
    tables = {"unet": ldm.unet_table((2, 2, 2, 2), (False, True, True, True)), "vae": ldm.vae_table(4, 2)}
    if model == "sd2":
        tables["text_encoder"] = ldm.openclip_table(configs["text_encoder"].num_hidden_layers)
    for network, table in tables.items():
        assert len(set(table.values())) == len(table)
        inverse = {theirs: ours for ours, theirs in table.items()}
        names = [name for (part, name) in published(model) if part == network]
        names = [f"text_model.{name}" if network == "text_encoder" else name for name in names]
        there = [ldm.translate(name, table) for name in names]
        assert None not in there
        assert len(set(there)) == len(names)
        assert [ldm.translate(name, inverse) for name in there if name] == names
        back = {"unet": ldm.unet_sizes, "vae": ldm.vae_sizes}
        if network in back:
            args = ((2, 2, 2, 2), (False, True, True, True)) if network == "unet" else (4, 2)
            assert back[network]([name for name in there if name]) == args


def test_names_are_those_of_the_original_code():
    unet, vae = ldm.unet_table((2, 2, 2, 2), (False, True, True, True)), ldm.vae_table(4, 2)
    text = ldm.openclip_table(23)
    for name, original in {
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight":
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "down_blocks.3.resnets.1.time_emb_proj.bias": "input_blocks.11.0.emb_layers.1.bias",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.norm.weight": "output_blocks.11.1.norm.weight",
        "conv_norm_out.weight": "out.0.weight",
    }.items():  # fmt: skip
        assert ldm.translate(name, unet) == original
    for name, original in {
        "encoder.down_blocks.0.downsamplers.0.conv.weight": "encoder.down.0.downsample.conv.weight",
        "encoder.mid_block.attentions.0.to_out.0.weight": "encoder.mid.attn_1.proj_out.weight",
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": "decoder.up.1.block.0.nin_shortcut.weight",
        "decoder.up_blocks.2.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
        "decoder.conv_norm_out.bias": "decoder.norm_out.bias",
        "post_quant_conv.weight": "post_quant_conv.weight",
    }.items():
        assert ldm.translate(name, vae) == original
    for name, original in {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers.22.layer_norm2.bias": "transformer.resblocks.22.ln_2.bias",
        "text_model.encoder.layers.3.self_attn.out_proj.weight": "transformer.resblocks.3.attn.out_proj.weight",
        "text_model.encoder.layers.0.mlp.fc2.weight": "transformer.resblocks.0.mlp.c_proj.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
    }.items():
        assert ldm.translate(name, text) == original
    assert ldm.translate("down_blocks.4.resnets.0.norm1.weight", unet) is None


@pytest.mark.parametrize(("layout", "configs"), [("sd1", SD1), ("sd2", SD2)])
def test_the_published_sizes_are_found_from_shapes_alone(layout, configs):
    tensors = {}
    for network, table, prefix in (
        ("unet", ldm.unet_table((2, 2, 2, 2), (False, True, True, True)), "model.diffusion_model."),
        ("vae", ldm.vae_table(4, 2), "first_stage_model."),
        ("text_encoder", ldm.openclip_table(23), "cond_stage_model.model."),
    ):
        arrays = {
            name if network != "text_encoder" else f"text_model.{name}": np.broadcast_to(np.float16(0), shape)
            for (part, name), shape in published(layout).items() if part == network
        }  # fmt: skip
        if network == "text_encoder" and layout == "sd1":
            tensors |= {f"cond_stage_model.transformer.{name}": array for name, array in arrays.items()}
        else:
            tensors |= {prefix + name: array for name, array in ldm.to_ldm(arrays, table).items()}
    file = SingleFile(Path("a.safetensors"), tensors, {}, "epsilon")
    assert file.unknown == []
    assert file.config("unet") == configs["unet"]
    assert file.config("vae") == configs["vae"]
    text = file.config("text_encoder")
    assert replace(text, projection_dim=configs["text_encoder"].projection_dim) == configs["text_encoder"]
    assert file.scheduler == BETAS
    if layout == "sd2":
        larger = replace(file, prediction_type="v_prediction")
        assert (larger.config("unet").sample_size, larger.config("vae").sample_size) == (96, 768)
        assert larger.pad_id == 0


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_a_file_is_the_model_that_it_was_made_of(models, files, tokenizer, layout, caplog):
    model = read_model(files[layout], options=FileOptions(tokenizer))
    assert model.configs == models[layout].configs
    assert model.scheduler == models[layout].scheduler
    jax.tree.map(np.testing.assert_array_equal, model.params, models[layout].params)
    assert (model.tokenizer.pad_id == 0) == (layout == "sd2")
    assert ("does not say what its denoiser predicts" in caplog.text) == (layout == "sd2")
    assert "left out" not in caplog.text


def test_what_the_file_does_not_say_is_taken_from_the_arguments(models, files, tokenizer, caplog):
    model = read_model(files["sd2"], options=FileOptions(tokenizer, "epsilon", ema=True))
    assert model.scheduler.prediction_type == "epsilon"
    assert model.size == (128, 128)
    assert not caplog.text
    plain = models["sd2"].params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), model.params["denoiser"], plain["denoiser"])
    jax.tree.map(np.testing.assert_array_equal, model.params["vae"], plain["vae"])


def test_a_file_draws_what_its_folder_draws(models, files, tokenizer, tmp_path):
    models["sd1"].save(tmp_path / "folder")
    wanted = {"steps": 2, "size": (16, 16)}
    got = jaxdiff.load(files["sd1"], tokenizer=tokenizer)("a dog", **wanted)
    np.testing.assert_array_equal(got, jaxdiff.load(tmp_path / "folder")("a dog", **wanted))


def test_the_prediction_type_of_the_standard_metadata_is_no_guess(files, tmp_path, caplog):
    save_file(load_file(files["sd2"]), tmp_path / "a.safetensors", {"modelspec.prediction_type": "epsilon"})
    assert open_single(tmp_path / "a.safetensors").scheduler.prediction_type == "epsilon"
    assert not caplog.text


def test_parts_are_read_from_a_file_wherever_a_part_is_asked_for(models, files, tmp_path):
    vae = models["sd1"].networks["vae"]
    write_single(tmp_path / "vae.safetensors", {"vae": vae})
    for path in (files["sd1"], tmp_path / "vae.safetensors"):
        assert find_part(path, "vae") == path
        config, params = read_part(str(path), "vae", None, "task.vae")
        assert config == read_config(path, "vae") == vae.config
        jax.tree.map(np.testing.assert_array_equal, params, vae.params)
    assert {name.split(".")[0] for name in load_file(tmp_path / "vae.safetensors")} == {
        "encoder", "decoder", "quant_conv", "post_quant_conv",
    }  # fmt: skip
    assert model_schedule(files["sd1"]) == BETAS
    with pytest.raises(ValueError, match=r"a text encoder of 600 tokens, where CLIP's has 49408.*; name a folder"):
        find_part(files["sd1"], "tokenizer")


def test_training_starts_from_a_file(models, files, tokenizer):
    task = DiffusionTask(tokenizer=str(tokenizer), scheduler=SchedulerConfig(prediction_type="epsilon"))
    task = resolve(TrainConfig("runs/x", task, model=str(files["sd2"]))).task
    assert isinstance(task, DiffusionTask)
    assert (task.unet, task.text_encoder) == tuple(models["sd2"].configs[r] for r in ("denoiser", "text_encoder"))
    assert (task.vae, task.init) == (str(files["sd2"]),) * 2
    assert task.scheduler == BETAS
    assert read_tokenizers(task)[0].pad_id == 0
    with pytest.raises(ValueError, match=r"--task\.tokenizer for train\.py"):
        resolve(TrainConfig("runs/x", DiffusionTask(), model=str(files["sd2"])))


@pytest.mark.parametrize(("like", "pad"), [(LIKE_SD1, None), (LIKE_SD2, 0)], ids=["sd1", "sd2"])
def test_a_file_of_clips_vocabulary_needs_no_tokenizer(like, pad, tmp_path):
    text = replace(like["text_encoder"], vocab_size=49_408, bos_token_id=49_406, eos_token_id=49_407)
    whole = tiny.model(BETAS, **like | {"text_encoder": text})
    write_single(tmp_path / "a.safetensors", named(whole), whole.scheduler, {"text_encoder": pad})
    tokenizer = read_model(tmp_path / "a.safetensors").tokenizer
    filled = [49407 if pad is None else pad] * 17
    assert tokenizer(["a photo of a cat"])[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, *filled]
    assert run(tmp_path / "a.safetensors", tmp_path / "folder") == 0
    prompts = ["a photo, of a CAT!", "\u00e9t\u00e9 <|endoftext|>"]
    np.testing.assert_array_equal(read_model(tmp_path / "folder").tokenizer(prompts), tokenizer(prompts))
    task = DiffusionTask(scheduler=SchedulerConfig(prediction_type="epsilon"))
    task = resolve(TrainConfig("runs/x", task, model=str(tmp_path / "a.safetensors"))).task
    assert isinstance(task, DiffusionTask)
    np.testing.assert_array_equal(read_tokenizers(task)[0](prompts), tokenizer(prompts))


def test_a_model_whose_sizes_no_layout_has_comes_back_by_its_metadata(model, tmp_path):
    said = write_single(tmp_path / "a.safetensors", named(model), model.scheduler, defaults={"steps": 4})
    assert said["unet"]["attention_head_dim"] == [2, 2]
    model.save(tmp_path / "folder")
    back = read_model(tmp_path / "a.safetensors", options=FileOptions(tmp_path / "folder"))
    assert (back.configs, back.scheduler, back.defaults) == (model.configs, model.scheduler, {"steps": 4})
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


def test_text_towers_without_their_prefix_are_read(models, files, tmp_path):
    tensors = load_file(files["sd1"])
    save_file({name.replace("text_model.", ""): array for name, array in tensors.items()}, tmp_path / "a.safetensors")
    _, params = read_network(tmp_path / "a.safetensors", "text_encoder")
    jax.tree.map(np.testing.assert_array_equal, params, models["sd1"].params["text_encoder"])


# Converting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sd1", "sd2"])
def test_a_file_to_a_folder_and_back_is_the_same_bit_for_bit(files, tokenizer, tmp_path, layout, capsys):
    assert run(files[layout], tmp_path / "folder", "--tokenizer", tokenizer) == 0
    said = capsys.readouterr().out
    assert f"kept in {tmp_path / 'folder' / UNMAPPED}" in said
    assert "model_ema.* (" in said
    assert run(tmp_path / "folder", tmp_path / "back.safetensors") == 0
    same(open_safetensors(tmp_path / "back.safetensors"), open_safetensors(files[layout]))
    again = read_model(tmp_path / "folder")
    jax.tree.map(
        np.testing.assert_array_equal,
        again.params,
        read_model(files[layout], options=FileOptions(tokenizer)).params,
    )
    assert (again.tokenizer.pad_id == 0) == (layout == "sd2")


def test_a_folder_to_a_file_and_back_is_the_same_bit_for_bit(model, tmp_path):
    replace(model, defaults={"steps": 4}).save(tmp_path / "folder", "bfloat16")
    assert run(tmp_path / "folder", tmp_path / "a.safetensors") == 0
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    same(open_safetensors(tmp_path / "a.safetensors"), open_safetensors(tmp_path / "b.safetensors"))
    assert run(tmp_path / "b.safetensors", tmp_path / "back", "--tokenizer", tmp_path / "folder") == 0
    for file in (tmp_path / "folder").rglob("*"):
        if file.is_file():
            assert (tmp_path / "back" / file.relative_to(tmp_path / "folder")).read_bytes() == file.read_bytes(), file


def test_the_type_is_changed_where_it_is_asked_for(files, tmp_path, capsys):
    assert run(files["sd1"], tmp_path / "a.safetensors", "--dtype", "float16", "--no-rest") == 0
    assert "left out" in capsys.readouterr().out
    tensors = open_safetensors(tmp_path / "a.safetensors")
    whole = open_safetensors(files["sd1"])
    assert {array.dtype.name for array in tensors.values()} == {"float16"}
    assert not [name for name in tensors if name.startswith("model_ema")]
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, whole[name].astype(np.float16))


def test_averages_take_the_place_of_the_plain_weights(files, tmp_path):
    assert run(files["sd1"], tmp_path / "a.safetensors", "--ema") == 0
    tensors, whole = open_safetensors(tmp_path / "a.safetensors"), open_safetensors(files["sd1"])
    name = "model.diffusion_model.out.2.weight"
    np.testing.assert_array_equal(tensors[name], whole[average(name)])
    assert average(name) not in tensors
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--ema") == 2


def test_a_vae_alone_goes_there_and_back(models, tmp_path):
    tensors = {}
    write_single(tmp_path / "vae.safetensors", {"vae": models["sd1"].networks["vae"]})
    tensors = load_file(tmp_path / "vae.safetensors") | {"loss.logvar": np.array(0, np.float32)}
    save_file(tensors, tmp_path / "vae.safetensors")
    assert run(tmp_path / "vae.safetensors", tmp_path / "folder") == 0
    assert run(tmp_path / "folder", tmp_path / "back.safetensors") == 0
    same(open_safetensors(tmp_path / "back.safetensors"), tensors)


def test_a_run_is_what_it_exported(model, tmp_path, capsys):
    run_folder = tmp_path / "run"
    (run_folder / "export").mkdir(parents=True)
    (run_folder / "config.json").write_text('{"task": {}}')
    assert run(run_folder, tmp_path / "a.safetensors") == 2
    assert "is a run that has exported no vae" in capsys.readouterr().err
    model.save(run_folder / "export")
    assert run(run_folder, tmp_path / "a.safetensors") == 0
    _, params = read_network(tmp_path / "a.safetensors", "unet")
    jax.tree.map(np.testing.assert_array_equal, params, model.params["denoiser"])
    (run_folder / "export" / "model_index.json").unlink()
    assert run(run_folder, tmp_path / "vae.safetensors") == 2
    (run_folder / "export" / "unet").rename(tmp_path / "elsewhere")
    assert run(run_folder, tmp_path / "vae.safetensors") == 0
    assert open_single(tmp_path / "vae.safetensors").config("vae") == model.configs["vae"]


def test_only_our_own_files_give_way(files, model, tmp_path, capsys):
    model.save(tmp_path / "folder")
    mine = tmp_path / "mine.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, mine)
    before = mine.read_bytes()
    assert run(tmp_path / "folder", mine) == 2
    assert "not ours to replace" in capsys.readouterr().err
    assert mine.read_bytes() == before
    assert run(tmp_path / "folder", tmp_path / "a.safetensors") == 0
    assert run(tmp_path / "folder", tmp_path / "a.safetensors") == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for src, dst, words in [
        (tmp_path / "folder", tmp_path / "folder", "written over itself"),
        (tmp_path / "folder", tmp_path / "full", "not ours to replace"),
        (tmp_path / "folder", tmp_path / "a.ckpt", "ends in .safetensors"),
        (files["sd1"], tmp_path / "new", "does not hold its tokenizer"),
        (tmp_path / "nothing.safetensors", tmp_path / "new", "cannot be read"),
        (tmp_path / "nothing", tmp_path / "new", "not a diffusers model folder"),
        (tmp_path / "folder", mine / "a.safetensors", "cannot be written"),
    ]:
        assert run(src, dst) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


# What is wrong --------------------------------------------------------------------------------------------------------

HALF = {"a": np.zeros((2, 2), np.float32)}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "LoRA"),
        (["unet.mid_block.to_q.lora_A.weight"], "LoRA"),
        (["lora_unet_a.hada_w1_a"], "LoRA"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["image_proj.proj.weight"], "IP-Adapter"),
        (["adapter.body.0.block1.weight"], "T2I-Adapter"),
        (["emb_params"], "textual inversion"),
        (["model.diffusion_model.label_emb.0.0.weight", "noise_augmentor.data_mean"], "unCLIP"),
        (["down_blocks.0.resnets.0.conv1.weight"], "network of a diffusers folder"),
        (["text_model.embeddings.token_embedding.weight"], "network of a diffusers folder"),
        (["shared.weight"], "T5"),
        (["something.else"], r"tensors such as something\.else"),
    ],
)  # fmt: skip
def test_other_files_are_told_in_one_sentence(tmp_path, names, words):
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        read_model(tmp_path / "a.safetensors", options=FileOptions(tmp_path))
    assert str(tmp_path / "a.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


FIRST = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
DEEP = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FIRST), "not whole: down_blocks.0.resnets.0.conv1.weight is missing"),
        (lambda t: t.pop(DEEP), "1 missing: down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        (lambda t: t.update({FIRST: np.zeros(3, np.float32)}), "of no shape that a unet has"),
        (lambda t: t.update({DEEP: np.zeros((3, 3), np.float32)}), "1 misshapen"),
        (lambda t: t.update({DEEP: t[DEEP] * np.nan}), "1 not finite"),
        (lambda t: t.update({DEEP: t[DEEP].astype(np.int32)}), "not float16"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("first_stage_model.")], "too"),
        (lambda t: t.update({FIRST: np.zeros((33, 32, 3, 3), np.float32)}), "norm_num_groups"),
        (lambda t: t.update({"model.diffusion_model.input_blocks.1.1.a_0.weight": t[DEEP]}), "is not one that"),
        (lambda t: t.update({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight":
                             np.zeros((9, 63), np.float32)}), "how many heads"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_in_one_sentence(files, tokenizer, tmp_path, change, words):
    tensors = load_file(files["sd1"])
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        read_model(tmp_path / "a.safetensors", options=FileOptions(tokenizer))
    assert str(tmp_path / "a.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_told(files, tokenizer, tmp_path, capsys):
    whole = files["sd1"].read_bytes()
    for length in (0, 4, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.safetensors").write_bytes(whole[:length])
        assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 2
        assert str(tmp_path / "a.safetensors") in capsys.readouterr().err


@pytest.mark.parametrize(
    "said",
    ["{", "[]", '{"unet": 3}', '{"unet": {"attention_head_dim": "x"}}', '{"unet": {"attention_head_dim": 7}}',
     '{"pad_id": "x"}', '{"pad_id": -1}', '{"pad_id": 100000}', '{"scheduler": {"beta_start": 2}}',
     '{"scheduler": {"prediction_type": "wild"}}', '{"unet": {"norm_num_groups": 0}}', '{"defaults": 3}'],
)  # fmt: skip
def test_metadata_that_make_no_sense_are_an_error(files, tokenizer, tmp_path, said):
    save_file(load_file(files["sd1"]), tmp_path / "a.safetensors", {"jaxdiff": said})
    with pytest.raises(ValueError, match=r"."):
        read_model(tmp_path / "a.safetensors", options=FileOptions(tokenizer))


def test_tensors_of_no_known_use_are_told_and_kept(files, tokenizer, tmp_path, caplog, capsys):
    save_file(load_file(files["sd1"]) | {"hypernetwork.a": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    read_model(tmp_path / "a.safetensors", options=FileOptions(tokenizer))
    assert "1 tensors are left out, which are of no known use: hypernetwork.a" in caplog.text
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    assert "of no known use: hypernetwork.a" in capsys.readouterr().out
    assert "hypernetwork.a" in open_safetensors(tmp_path / "b.safetensors")


def test_options_of_files_are_refused_beside_a_folder_and_wrong_ones_beside_a_file(model, files, tokenizer, tmp_path):
    model.save(tmp_path / "folder")
    with pytest.raises(ValueError, match="is no single file"):
        jaxdiff.load(tmp_path / "folder", ema=True)
    with pytest.raises(ValueError, match=r"prediction_type is 'v'; choose one of epsilon, v_prediction"):
        jaxdiff.load(files["sd1"], tokenizer=tokenizer, prediction_type="v")
    with pytest.raises(ValueError, match="does not hold its tokenizer"):
        jaxdiff.load(files["sd1"])
    save_file({n: a for n, a in load_file(files["sd1"]).items() if "ema" not in n}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no averaged"):
        jaxdiff.load(tmp_path / "a.safetensors", tokenizer=tokenizer, ema=True)


def test_what_a_layout_has_no_place_for_is_not_written(model, tmp_path):
    uneven = replace(tiny.UNET, down_block_types=("CrossAttnDownBlock2D",) * 2,
                     up_block_types=("CrossAttnUpBlock2D",) * 2,
                     transformer_layers_per_block=(1, 2))  # fmt: skip
    rng = np.random.default_rng(0)
    networks = {"unet": (uneven, tiny.random_params("unet", uneven, rng))}
    write_single(tmp_path / "a.safetensors", networks)
    assert open_single(tmp_path / "a.safetensors").config("unet") == uneven
    assert json.loads(read_metadata(tmp_path / "a.safetensors")["jaxdiff"])["unet"]["norm_num_groups"] == 4
    assert build.unet(uneven).mid_depth == 2
    wrong = (uneven, {**networks["unet"][1], "other": {"kernel": np.zeros((2, 2), np.float32)}})
    with pytest.raises(ValueError, match=r"other\.weight has no name"):
        write_single(tmp_path / "b.safetensors", {"unet": wrong})
    assert not (tmp_path / "b.safetensors").exists()
