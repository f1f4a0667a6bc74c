"""LPIPS is a distance, its gradient is finite everywhere, and its weights are those that were looked at."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxdiff.config import LPIPSConfig
from jaxdiff.evaluation import lpips
from jaxdiff.evaluation.lpips import unpickled_arrays
from jaxdiff.models.lpips import BACKBONES, LPIPS, SMALLEST, Backbone, lpips_params, unit

ALEX = LPIPSConfig()


@pytest.fixture(scope="module")
def params():
    drawn = tiny.random_params("lpips", ALEX, np.random.default_rng(0))
    return {name: np.abs(x) if name.startswith("weight") else x for name, x in drawn.items()}


def images(n=2, side=40, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (n, side, side, 3)).astype(np.float32)


def test_it_is_0_of_equal_images_and_the_same_both_ways(params):
    distance, a, b = lpips.compiled_lpips("alex"), images(), images(seed=2)
    assert np.asarray(distance(params, a, a)).tolist() == [0, 0]
    np.testing.assert_allclose(distance(params, a, b), distance(params, b, a), rtol=1e-6)
    near = distance(params, a, a + 0.02 * (b - a))
    assert (near > 0).all()
    assert (near < distance(params, a, b)).all()


def test_a_pair_is_measured_by_itself(params):
    distance, a, b = lpips.compiled_lpips("alex"), images(3), images(3, seed=2)
    np.testing.assert_allclose(distance(params, a, b)[2:], distance(params, a[2:], b[2:]), rtol=1e-5)


def test_features_that_are_all_0_have_a_gradient(params):
    """As an image's have that is so dark that no filter answers; PyTorch's is NaN there."""
    dark = jax.tree.map(np.copy, params)
    for layer in dark["backbone"].values():
        layer["bias"] = np.full_like(layer["bias"], -1e6)
    graded = jax.jit(jax.grad(lambda b, a: LPIPS("alex").apply({"params": dark}, a, b).sum()))
    assert np.isfinite(graded(images(seed=2), images())).all()
    jacobian = jax.grad(lambda x: unit(x).sum())(jnp.zeros((1, 1, 2, 3)))
    assert np.isfinite(jacobian).all()
    lengths = jnp.sqrt(jnp.square(unit(jnp.asarray(images()))).sum(-1))
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_the_smallest_side_is_the_smallest(backbone):

    def pixels(side):
        """Of each compared layer's features."""
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        net = Backbone(BACKBONES[backbone])
        found, _ = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), image)
        return [x.shape[1] for x in found]

    assert min(pixels(SMALLEST[backbone])) == 1
    assert min(pixels(SMALLEST[backbone] - 1)) == 0
    assert sum(layer.compared for layer in BACKBONES[backbone]) == 5


def test_params_have_the_shapes_of_the_network_and_what_is_missing_is_named(params):
    convs = {name.removeprefix("conv_"): conv for name, conv in params["backbone"].items()}
    weights = {name.removeprefix("weight_"): x for name, x in params.items() if name.startswith("weight_")}
    made = lpips_params("alex", convs, weights)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
    with pytest.raises(ValueError, match=r"need convolution 1's kernel \[5, 5, 64, 192\]; it is missing"):
        lpips_params("alex", {"0": convs["0"]}, weights)
    with pytest.raises(ValueError, match=r"need weights 2 \[384\]; it is \[7\]"):
        lpips_params("alex", convs, weights | {"2": np.zeros(7, np.float32)})


def test_a_pickle_of_arrays_is_read_and_one_that_calls_anything_is_not(tmp_path):
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.float32([1.5]), "d": [1, "x", None]}
    found = unpickled_arrays(pickle.dumps(tree))
    np.testing.assert_array_equal(found["a"]["b"], tree["a"]["b"])
    assert found["d"] == tree["d"]

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    for content in (pickle.dumps({"a": Harm()}), pickle.dumps(tree)[:-9], b"", b"\x80\x04."):
        with pytest.raises(ValueError, match="is not read"):
            unpickled_arrays(content)
    assert not (tmp_path / "made").exists()


def test_weights_that_are_not_there_or_not_those_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not there: `python -m jaxdiff.tools.prepare lpips"):
        lpips.read_lpips(tmp_path, "alex")
    (tmp_path / lpips.FILES["alex"]).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* delete it"):
        lpips.open_lpips(tmp_path, "alex")
    (tmp_path / lpips.ARCHIVE).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* delete it"):
        lpips.fetch(tmp_path, tmp_path)
