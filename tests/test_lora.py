"""LoRA files and their kin: W + strength * change, exactly, or a sentence that says why not."""

import json
import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.adapters.lora import KINDS, Change, Merged
from jaxdiff.generation.pipeline import Pipeline
from jaxdiff.generation.weights import Weights
from jaxdiff.io.convert import leaves, torch_views
from jaxdiff.io.lora import LoRA
from jaxdiff.io.weights import stored, write_safetensors

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PROJ_IN = "down_blocks.0.attentions.0.proj_in"
CONV = "down_blocks.0.resnets.0.conv1"
FC1 = "text_model.encoder.layers.1.mlp.fc1"
ROLES = {"unet": "denoiser", "text_encoder": "text_encoder"}


def kohya(name: str) -> str:
    return f"lora_{'te' if name.startswith('text') else 'unet'}_{name.replace('.', '_')}"


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def weights(model):
    return all_weights(model)


@pytest.fixture
def write(tmp_path):
    """Writes tensors to a file of this name."""

    def write(tensors, name="a.safetensors", metadata=None):
        arrays = {key: np.asarray(value, np.float32) for key, value in tensors.items()}
        write_safetensors(tmp_path / name, {k: s._replace(checked=False) for k, s in stored(arrays).items()}, metadata)
        return tmp_path / name

    return write


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def all_weights(model):
    """Both networks' arrays by torch names, in torch's order."""
    return {name: array for role in ROLES.values() for name, array in torch_views(model.params[role]).items()}


def low_rank(name, w, rank=3, alpha=None, seed=0):
    """kohya's tensors for a weight, and the change that they stand for."""
    up, down = normal(w.shape[0], rank, seed=seed), normal(rank, *w.shape[1:], seed=seed + 1)
    tensors = {f"{name}.lora_up.weight": up.reshape(up.shape + (1,) * (w.ndim - 2)), f"{name}.lora_down.weight": down}
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.float32(alpha)
    change = (up @ down.reshape(rank, -1)).reshape(w.shape)
    return tensors, change * (1 if alpha is None else alpha / rank)


def assert_changed(model, weights, changes, rtol=1e-5):
    """The model's weights are `weights` with `changes` by name added, and to the bit where nothing was changed."""
    for name, array in all_weights(model).items():
        if name in changes:
            np.testing.assert_allclose(array, weights[name] + changes[name], rtol, 1e-5)
        else:
            np.testing.assert_array_equal(array, weights[name])


@pytest.mark.parametrize("module", [TO_Q, PROJ_IN, CONV, FC1])
def test_a_lora_adds_strength_times_alpha_over_rank_times_up_down(model, weights, write, module):
    tensors, change = low_rank(kohya(module), weights[f"{module}.weight"], alpha=1.5)
    changed = model.with_loras([(write(tensors), -0.4)])
    assert_changed(changed, weights, {f"{module}.weight": -0.4 * change})


def test_without_alpha_the_scale_is_1(model, weights, write):
    tensors, change = low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])
    assert_changed(model.with_loras([write(tensors)]), weights, {f"{TO_Q}.weight": change})


OTHER_NAMES = {
    "original": {TO_Q: "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"},
    "peft": {TO_Q: f"unet.{TO_Q}", CONV: f"unet.{CONV}", FC1: f"text_encoder.{FC1}"},
    "without text_model": {FC1: f"text_encoder.{FC1.removeprefix('text_model.')}"},
    "peft's own": {TO_Q: f"base_model.model.{TO_Q}", FC1: f"base_model.model.{FC1}"},
}


@pytest.mark.parametrize("spelling", OTHER_NAMES)
@pytest.mark.parametrize(
    "pair", ["lora_{}.weight", "lora_{}.default.weight", "lora.{}.weight", "lora_linear_layer.{}.weight"]
)
def test_every_spelling_means_the_same(model, weights, write, spelling, pair):
    up, down = ("B", "A") if "lora_{}." in pair else ("up", "down")
    tensors, changes = {}, {}
    for module, name in OTHER_NAMES[spelling].items():
        given, changes[f"{module}.weight"] = low_rank("x", weights[f"{module}.weight"], alpha=2)
        tensors |= {
            f"{name}.{pair.format(up)}": given["x.lora_up.weight"],
            f"{name}.{pair.format(down)}": given["x.lora_down.weight"],
            f"{name}.alpha": given["x.alpha"],
        }
    assert_changed(model.with_loras([write(tensors)]), weights, changes)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (TO_Q, f"unet.{TO_Q.removesuffix('.to_q')}.processor.to_q_lora"),
        (TO_Q, f"{TO_Q.removesuffix('.to_q')}.processor.to_q_lora"),
        (TO_Q.replace("to_q", "to_out.0"), f"unet.{TO_Q.removesuffix('.to_q')}.processor.to_out_lora"),
        (f"{FC1[:-7]}self_attn.out_proj", f"text_encoder.{FC1[:-7]}self_attn.to_out_lora"),
    ],
)
def test_the_first_names_of_diffusers_are_read(model, weights, write, module, name):
    given, change = low_rank("x", weights[f"{module}.weight"])
    tensors = {f"{name}.{half}.weight": given[f"x.lora_{half}.weight"] for half in ("up", "down")}
    assert_changed(model.with_loras([write(tensors)]), weights, {f"{module}.weight": change})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 3, "lora_alpha": 6}, 2),
        ({"r": 3, "lora_alpha": 0}, 0),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {TO_Q: 3}, "alpha_pattern": {TO_Q: 1.5, "conv1": 9}}, 0.5),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 9}}, 3),
    ],
)
def test_pefts_settings_say_the_scale(model, weights, write, settings, scale):
    given, change = low_rank("x", weights[f"{TO_Q}.weight"])
    tensors = {f"unet.{TO_Q}.lora_{half}.weight": given[f"x.lora_{which}.weight"] for half, which in
               (("A", "down"), ("B", "up"))}  # fmt: skip
    said = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
    path = write(tensors, metadata=said)
    assert_changed(model.with_loras([path]), weights, {f"{TO_Q}.weight": scale * change})
    # peft itself writes them beside the file
    path = write({name.replace("unet.", "base_model.model."): a for name, a in tensors.items()}, "b.safetensors")
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    assert_changed(model.with_loras([path]), weights, {f"{TO_Q}.weight": scale * change})


def test_two_at_once_are_the_sum_in_any_order(model, weights, write):
    w = weights[f"{TO_Q}.weight"]
    first, a = low_rank(kohya(TO_Q), w, rank=2)
    second, b = low_rank(kohya(TO_Q), w, rank=5, alpha=1, seed=7)
    files = [(write(first, "a.safetensors"), 0.8), (write(second, "b.safetensors"), -0.3)]
    there, back = model.with_loras(files), model.with_loras(files[::-1])
    assert_changed(there, weights, {f"{TO_Q}.weight": 0.8 * a - 0.3 * b})
    for name, array in all_weights(there).items():
        np.testing.assert_array_equal(array, all_weights(back)[name])


def kinds(w):
    """Tensors and the change of every kind, for a weight [8 8 3 3] or [8 8]."""
    o, i, *k = w.shape
    r, n = 3, w[0].size
    up, down, mid = normal(o, r), normal(r, i, seed=1), normal(r, r, *k, seed=2)
    a, b, c, d = normal(o, r), normal(r, n, seed=1), normal(o, r, seed=2), normal(r, n, seed=3)
    p, q = normal(2, 4), normal(4, 2, *k, seed=1)
    pa, pb, qa, qb = normal(2, 1), normal(1, 4, seed=1), normal(4, r, seed=2), normal(r, 2, *k, seed=3)
    low = (up @ normal(r, n, seed=9)).reshape(w.shape)
    kernel = (1,) * len(k)

    def kron(x, y):
        y = y.reshape(*y.shape[:2], -1)
        return np.einsum("ab,cdk->acbdk", x, y).reshape(w.shape)

    found = {
        "LoHa": ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": 6},
                 2 * ((a @ b) * (c @ d)).reshape(w.shape)),
        "LoKr, whole": ({"lokr_w1": p, "lokr_w2": q, "alpha": 6}, kron(p, q)),
        "LoKr, products": ({"lokr_w1_a": pa, "lokr_w1_b": pb, "lokr_w2_a": qa, "lokr_w2_b": qb, "alpha": 6},
                           2 * kron(pa @ pb, (qa @ qb.reshape(r, -1)).reshape(4, 2, *k))),
        "LoKr, a product": ({"lokr_w1_a": pa, "lokr_w1_b": pb, "lokr_w2": q, "alpha": 6}, 6 * kron(pa @ pb, q)),
        "full": ({"diff": low}, low),
        "IA3, inputs": ({"weight": down[0], "on_input": 1}, w * down[0].reshape(1, -1, *kernel)),
        "IA3, outputs": ({"weight": up[:, 0], "on_input": 0}, w * up[:, 0].reshape(-1, 1, *kernel)),
    }  # fmt: skip
    for axis, lengths in ((0, normal(o)), (1, normal(i))):
        others = tuple(x for x in range(w.ndim) if x != axis)
        lengths = np.expand_dims(abs(lengths) + 1, others)
        new = w + low
        new = new * lengths / np.sqrt((new**2).sum(others, keepdims=True))
        tensors = {"lora_up.weight": up, "lora_down.weight": normal(r, n, seed=9).reshape(r, i, *k)}
        found[f"DoRA, axis {axis}"] = (tensors | {"dora_scale": lengths}, new - w)
        if axis == 0:
            peft = lengths.reshape(-1) if w.ndim == 2 else lengths.reshape(1, -1, 1, 1)
            found["DoRA, peft"] = (tensors | {"lora_magnitude_vector": peft}, new - w)
    if k:
        found["Tucker"] = (
            {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": 6},
            2 * np.einsum("or,rshw,si->oihw", up, mid, down),
        )
        found["LoHa, Tucker"] = (
            {"hada_w1_a": up.T, "hada_w1_b": down, "hada_t1": mid,
             "hada_w2_a": up.T, "hada_w2_b": down, "hada_t2": mid},
            np.einsum("or,rshw,si->oihw", up, mid, down) ** 2,
        )  # fmt: skip
        found["LoKr, Tucker"] = (
            {"lokr_w1": p, "lokr_w2_a": qa.T, "lokr_w2_b": qb[:, :, 0, 0], "lokr_t2": mid, "alpha": 6},
            2 * kron(p, np.einsum("or,rshw,si->oihw", qa, mid, qb[:, :, 0, 0])),
        )
    return found


NAMES = {module: list(kinds(normal(*shape))) for module, shape in ((TO_Q, (8, 8)), (CONV, (8, 8, 3, 3)))}


@pytest.mark.parametrize(("module", "kind"), [(module, kind) for module, names in NAMES.items() for kind in names])
def test_every_kind_is_its_formula(model, weights, write, module, kind):
    tensors, change = kinds(weights[f"{module}.weight"])[kind]
    path = write({f"{kohya(module)}.{name}": value for name, value in tensors.items()})
    changed = model.with_loras([(path, 0.5)])
    assert_changed(changed, weights, {f"{module}.weight": 0.5 * change}, 1e-4)


def test_biases_and_norms_are_changed_too(model, weights, write):
    norm = CONV.replace("conv1", "norm1")
    b, c, d = normal(8), normal(8, seed=1), normal(8, seed=2)
    tensors, change = low_rank(kohya(CONV), weights[f"{CONV}.weight"])
    tensors |= {f"{kohya(CONV)}.diff_b": b, f"{kohya(norm)}.w_norm": c, f"{kohya(norm)}.b_norm": d}
    changes = {f"{CONV}.weight": change, f"{CONV}.bias": b, f"{norm}.weight": c, f"{norm}.bias": d}
    assert_changed(model.with_loras([write(tensors)]), weights, changes)


def test_strength_0_is_the_plain_model_and_only_what_is_touched_becomes_an_array(model, weights, write):
    tensors, _ = low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])
    path = write(tensors)
    for (_, plain), (_, same) in zip(leaves(model.params), leaves(model.with_loras([(path, 0)]).params), strict=True):
        assert same is plain
    changed = [leaf for _, leaf in leaves(model.with_loras([path]).params) if isinstance(leaf, Merged)]
    assert len(changed) == 1
    placed = Weights(model.with_loras([path]).params, np.float32)["denoiser"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))


@pytest.mark.slow
def test_pictures_change_and_are_kept_by_saving(model, write, weights, tmp_path):
    tensors = low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])[0] | low_rank(kohya(FC1), weights[f"{FC1}.weight"])[0]
    path = write(tensors)
    model.save(tmp_path / "model")
    plain = jaxdiff.load(tmp_path / "model")
    drawn = {s: jaxdiff.load(tmp_path / "model", loras=[(path, s)])("a dog", steps=2) for s in (0, 1)}
    np.testing.assert_array_equal(drawn[0], plain("a dog", steps=2))
    assert tiny.off(drawn[1], drawn[0]) > 5
    low = jaxdiff.load(tmp_path / "model", loras=[path], memory="low")("a dog", steps=2)
    assert tiny.off(low, drawn[1]) <= 2
    jaxdiff.load(tmp_path / "model", loras=[path]).save(tmp_path / "merged")
    np.testing.assert_array_equal(jaxdiff.load(tmp_path / "merged")("a dog", steps=2), drawn[1])


def test_a_file_that_is_written_to_after_it_was_read_is_not_used(model, weights, write):
    path = write(low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])[0])
    pipe = Pipeline(model.with_loras([path]))
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"1234")
    with pytest.raises(ValueError, match=r"a\.safetensors was written to"):
        pipe("a dog", steps=1)


def test_half_precision_weights_are_added_to_in_float32(model, weights, write, tmp_path):
    tensors, change = low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])
    path = write(tensors)
    model.save(tmp_path / "half", np.float16)
    got = all_weights(jaxdiff.load(tmp_path / "half", loras=[path]).model)[f"{TO_Q}.weight"]
    expected = weights[f"{TO_Q}.weight"].astype(np.float16).astype(np.float32) + change
    np.testing.assert_allclose(got, expected, 1e-6, 1e-6)


def test_tensors_without_a_place_are_told_by_name(model, weights, write, caplog):
    tensors, change = low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])
    strange = {f"lora_unet_nowhere_{i:02}.alpha": 1 for i in range(12)} | {f"{kohya(CONV)}.weight": np.ones(3)}
    path = write(tensors | strange)
    with caplog.at_level(logging.WARNING):
        assert_changed(model.with_loras([path]), weights, {f"{TO_Q}.weight": change})
    assert "13 tensors have no place" in caplog.text
    assert "lora_unet_nowhere_08.alpha and 3 more" in caplog.text


Q, C = kohya(TO_Q), kohya(CONV)
UP, DOWN = f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "changes nothing"),
        ({"lora_unet_nowhere.lora_up.weight": np.ones((2, 2))}, "changes nothing.*lora_unet_nowhere"),
        ({f"{Q}.alpha": 1}, "changes nothing"),
        ({UP: np.ones((8, 2))}, f"unet {TO_Q}.weight: there is no lora_down"),
        ({UP: np.ones((8, 2)), DOWN: np.ones((2, 9))}, r"lora_down \[2, 9\], lora_up \[8, 2\] do not fit .* \[8, 8\]"),
        ({UP: np.ones((8, 2)), DOWN: np.ones((3, 8))}, "do not fit"),
        ({UP: np.ones((4, 2)), DOWN: np.ones((2, 16))}, "do not fit"),
        ({UP: np.ones((4, 2)), DOWN: np.ones((2, 16)), f"{Q}.dora_scale": np.ones((8, 1))}, "do not fit"),
        ({UP: np.ones(()), DOWN: np.ones((3, 8))}, r"shape \[\]"),
        ({UP: np.ones((8, 0)), DOWN: np.ones((0, 8))}, "is empty"),
        ({UP: np.full((8, 2), np.nan), DOWN: np.ones((2, 8))}, f"{UP} is not finite"),
        ({UP: np.ones((8, 2)), DOWN: np.ones((2, 8)), f"{Q}.alpha": np.ones(2)}, "makes no sense"),
        ({UP: np.ones((8, 2)), DOWN: np.ones((2, 8)), f"unet.{TO_Q}.lora_A.weight": np.ones((2, 8))}, "are both"),
        ({f"{Q}.diff_b": np.ones(8)}, "the model has none"),
        ({f"{Q}.hada_w1_a": np.ones((10**6, 1)), f"{Q}.hada_w1_b": np.ones((1, 10**6)),
          f"{Q}.hada_w2_a": np.ones((10**6, 1)), f"{Q}.hada_w2_b": np.ones((1, 10**6))}, "do not fit"),
        ({f"{C}.lora_up.weight": np.ones((8, 10**5)), f"{C}.lora_mid.weight": np.ones((10**5, 1, 3, 3)),
          f"{C}.lora_down.weight": np.ones((1, 8))}, "do not fit"),
        ({f"{Q}.lokr_w1": np.ones((2, 2)), f"{Q}.lokr_w2_a": np.ones((4, 2))}, "there is no lokr_w2_b"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": np.ones((2, 2))}, "for Stable Diffusion XL"),
        ({f"{kohya(TO_Q.replace('attn1.to_q', 'attn2.to_k'))}.lora_up.weight": np.ones((8, 2)),
          f"{kohya(TO_Q.replace('attn1.to_q', 'attn2.to_k'))}.lora_down.weight": np.ones((2, 2048))},
         "for Stable Diffusion XL"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": np.ones((2, 2))}, "for Flux"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 2))}, "SD3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(model, write, tensors, words):
    path = write(tensors)
    with pytest.raises(ValueError, match=words) as told:
        model.with_loras([path])
    assert "a.safetensors" in str(told.value) or "both" in words
    assert str(told.value).endswith(".")


@pytest.mark.parametrize("said", ["{", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}', "[" * 10**5])
def test_settings_that_make_no_sense_are_refused(model, write, said):
    path = write({f"unet.{TO_Q}.lora_B.weight": np.ones((8, 2)), f"unet.{TO_Q}.lora_A.weight": np.ones((2, 8))},
                 metadata={"lora_adapter_metadata": said})  # fmt: skip
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        model.with_loras([path])


def test_whole_numbers_are_no_low_rank(model, tmp_path):
    tensors = {UP: np.ones((8, 2), np.int8), DOWN: np.ones((2, 8), np.int8)}
    write_safetensors(tmp_path / "a.safetensors", stored(tensors))
    with pytest.raises(ValueError, match="is int8; supported are bfloat16, float16, float32"):
        model.with_loras([tmp_path / "a.safetensors"])


def test_files_of_torch_save_are_read(model, weights, tmp_path):
    torch = pytest.importorskip("torch")
    tensors, change = low_rank(Q, weights[f"{TO_Q}.weight"], alpha=1)
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, tmp_path / "a.bin")
    assert_changed(model.with_loras([tmp_path / "a.bin"]), weights, {f"{TO_Q}.weight": change})


def test_values_that_are_no_lora_are_refused(model, tmp_path):
    for value in (1, ("a", "b"), ("a", True), ("a", float("nan")), ("a", 1, 2, 3), ("a", 1, None), None):
        with pytest.raises(ValueError, match=r"A LoRA is|strength"):
            model.with_loras([value])
    with pytest.raises(ValueError, match="give a list"):
        jaxdiff.load(loras="a.safetensors")
    with pytest.raises(ValueError, match="No such file"):
        model.with_loras([tmp_path / "none.safetensors"])


def test_the_model_remembers_its_loras(model, weights, write):
    path = write(low_rank(kohya(TO_Q), weights[f"{TO_Q}.weight"])[0])
    changed = model.with_loras([path]).with_loras([(str(path), 0.5)])
    assert changed.loras == (LoRA(path, 1.0), LoRA(path, 0.5))
    assert replace(changed, loras=()).loras == model.loras


def test_kinds_share_no_tensors():
    names = [name for kind in KINDS.values() for name in kind.names]
    assert len(names) == len(set(names))
    assert Change(("LoRA",), {}).tensors == {}
