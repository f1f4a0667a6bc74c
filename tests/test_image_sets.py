"""Images become features one by one, from folders, models and prompts, and the command compares two sets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxdiff import build
from jaxdiff.config import Dinov2Config, to_dict
from jaxdiff.evaluation import features, frechet
from jaxdiff.evaluation.comparison import compare
from jaxdiff.evaluation.denoising import Heldout
from jaxdiff.evaluation.drawn import DrawnMeasures
from jaxdiff.evaluation.extractor import Extractor, resized
from jaxdiff.evaluation.sets import Drawing, ImageSet, open_set, through
from jaxdiff.io.convert import to_torch
from jaxdiff.io.weights import stored, write_safetensors
from jaxdiff.models.dinov2 import positions_for
from jaxdiff.models.inception import inception_params
from jaxdiff.tools import evaluate

CONFIG = Dinov2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=28
)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The folder of a tiny random DINOv2."""
    folder = tmp_path_factory.mktemp("dinov2")
    params = build.init(build.dinov2(CONFIG), CONFIG, jax.random.key(0))
    write_safetensors(folder / "model.safetensors", stored(to_torch(params)))
    (folder / "config.json").write_text(json.dumps(to_dict(CONFIG) | {"model_type": "dinov2"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 24 noisy images, of which one is brighter."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, most in (("a", 256), ("b", 200)):
        (root / name).mkdir()
        for i in range(24):
            Image.fromarray(rng.integers(0, most, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{i:02}.png")
    return root


def mean_colour(size: int = 4) -> Extractor:
    """Features that need no weights: the mean of each channel, plus a number."""

    def run(params, x):
        return x.mean((1, 2)) + params["add"][None], None

    return Extractor("mean", "0", resized(size, "clean"), run, {"add": jnp.ones(3)})


def test_features_of_an_image_do_not_depend_on_its_batch_and_may_come_in_any_size():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8 + i % 3, 9, 3), dtype=np.uint8) for i in range(70)]
    look = mean_colour(16)
    seen = look.look(images)
    assert seen.logits is None
    assert seen.features.shape == (70, 3)
    for i in (0, 31, 32, 69):
        np.testing.assert_allclose(look(images[i][None])[0], seen.features[i], rtol=1e-6)
        np.testing.assert_allclose(seen.features[i], images[i].mean((0, 1)) + 1, rtol=0.05)
    with pytest.raises(ValueError, match="no images"):
        look.look([])


def test_a_folder_is_read_in_order_and_a_bad_image_is_named(tmp_path, folders):
    found = open_set(folders / "a", n=5)
    assert found.count == 5
    first = np.asarray(Image.open(folders / "a" / "00.png"))
    assert (next(iter(found)) == first).all()
    with pytest.raises(ValueError, match="has no images"):
        open_set(tmp_path)
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x\.png cannot be read: it is not an image"):
        list(open_set(tmp_path))
    with pytest.raises(ValueError, match="is not there"):
        open_set(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_model_draws_prompts_and_prompts_are_drawn_by_a_model(tmp_path, pipe):
    pipe.save(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na red apple\nblue\n")
    drawing = Drawing(tmp_path / "model", prompts, seed=3, steps=2)
    by_model = list(open_set(tmp_path / "model", drawing))
    by_prompts = list(open_set(prompts, drawing, n=2))
    assert len(by_model) == 3
    assert len(by_prompts) == 2
    alone = pipe("a red apple", seed=4, steps=2)[0]
    for image in (by_model[1], by_prompts[1]):
        assert tiny.off(image, alone) <= 1
    with pytest.raises(ValueError, match="name a file of prompts"):
        open_set(tmp_path / "model")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a dog", "steps": -1}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1"):
        open_set(tmp_path / "bad.jsonl", drawing)


def test_images_through_an_autoencoder_are_what_it_gives_back(pipe):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    found = list(through(pipe, ImageSet("x", 5, images.__getitem__), batch=2))
    want = pipe.decode(pipe.encode(images))
    assert max(tiny.off(a, b) for a, b in zip(found, want, strict=True)) <= 1


def test_copies_have_psnr_and_ssim_and_too_few_images_are_refused(folders):
    a = open_set(folders / "a")
    darker = ImageSet("darker", a.count, lambda i: (a.image(i) // 2).astype(np.uint8))
    rows = {row.name: row for row in compare(darker, a, mean_colour(), pairs="copies", bootstrap=0).rows}
    assert 5 < rows["PSNR"].value < 15
    assert 0 < rows["SSIM"].value < 1
    assert rows["power of fine waves, A/B"].value == pytest.approx(0.25, rel=0.02)
    with pytest.raises(ValueError, match="has 3 images; fewer than 20"):
        compare(open_set(folders / "a", n=3), a, mean_colour())
    with pytest.raises(ValueError, match="24 images and B 23"):
        compare(a, open_set(folders / "a", n=23), mean_colour(), pairs="prompts")


def test_positions_for_the_own_grid_stay_and_for_others_a_plain_table_stays_plain():
    params = {"embeddings": {"position_embeddings": np.ones((1, 10, 4), np.float32)}}
    assert positions_for(params, 3) is params
    found = positions_for(params, 5)["embeddings"]["position_embeddings"]
    assert found.shape == (1, 26, 4)
    np.testing.assert_allclose(found, 1, rtol=1e-6)
    with pytest.raises(ValueError, match="are no square"):
        positions_for({"embeddings": {"position_embeddings": np.ones((1, 8, 4), np.float32)}}, 2)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, dinov2):
    with pytest.raises(ValueError, match=r"need Conv2d_1a_3x3\.bn\.weight \[32\]; it is missing"):
        inception_params({})
    with pytest.raises(ValueError, match="choose efficientnet-lite0, inception, dinov2, clip"):
        features.open_network("vgg", tmp_path)
    with pytest.raises(ValueError, match=r"nowhere cannot be read: No such file"):
        features.open_network("inception", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        features.open_network("dinov2", tmp_path)
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text().replace('"dinov2"', '"vit"'))
    with pytest.raises(ValueError, match='model_type is "vit"'):
        features.open_network("dinov2", tmp_path)
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text().replace('size": 16', 'size": 32'))
    (tmp_path / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="the weights do not fit the config"):
        features.open_network("dinov2", tmp_path)


def test_the_command_prints_a_table_and_writes_json(folders, dinov2, tmp_path, capsys):
    options = {"features": "dinov2", "weights": dinov2, "bootstrap": 2}
    evaluate.images(folders / "a", folders / "b", json_file=tmp_path / "out" / "x.json", **options)
    table = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "x.json").read_text())
    assert record["count_a"] == record["count_b"] == 24
    assert "DINOv2 of 2 layers" in record["features"]
    assert "224 px, clean" in record["features"]
    assert all(row["name"] in table for row in record["rows"])
    values = {row["name"]: row["value"] for row in record["rows"]}
    evaluate.images(folders / "a", folders / "a", json_file=tmp_path / "same.json", **options)
    same = {row["name"]: row["value"] for row in json.loads((tmp_path / "same.json").read_text())["rows"]}
    assert same["FD"] < 1e-6 * values["FD"]
    assert same["precision"] == same["recall"] == same["coverage"] == 1


@pytest.mark.slow
def test_what_is_drawn_for_held_out_captions_is_measured_the_same_every_time(pipe):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (22, 16, 16, 3), dtype=np.uint8)
    captions = ["a dog", "(a red apple", "blue"] * 7 + ["a dog"]
    data = Heldout(images, (), {"full": captions})
    measure = DrawnMeasures(("fd", "kid", "support", "told_apart"), data, mean_colour())
    found = measure(pipe, steps=2)
    assert found.keys() == {"fd", "kid", "kid_error", "kid_p", "precision", "recall", "density", "coverage",
                            "told_apart", "told_apart_p"}  # fmt: skip
    assert found == pytest.approx(measure(pipe, steps=2))
    drawn = [pipe(caption, seed=i, steps=2, literal=True)[0] for i, caption in enumerate(captions)]
    want = frechet.frechet(mean_colour()(np.stack(drawn)), mean_colour()(images))
    assert found["fd"] == pytest.approx(want, rel=0.01)
    with pytest.raises(ValueError, match="need 20"):
        DrawnMeasures(("fd",), Heldout(images[:5], (), {"full": captions[:5]}), mean_colour())
    with pytest.raises(ValueError, match="no measure 'fid'; choose fd"):
        DrawnMeasures(("fid",), data, mean_colour())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"features": "inception"}, "name them, --weights PATH"),
        ({}, "python -m jaxdiff.tools.prepare features"),
        ({"bootstrap": 1}, "--bootstrap is 1"),
    ],
)
def test_the_command_says_what_is_missing(folders, tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        evaluate.images(folders / "a", folders / "b", data_dir=tmp_path, **options)
