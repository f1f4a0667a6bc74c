"""Measures of the same features, and FID's network of the same weights, are those of other libraries run live.

torchmetrics and prdc are in the parity extra. pytorch-fid, clean-fid and torch-fidelity want torchvision, whose build
must be torch's own, and are not: where they are not installed, their tests are skipped.
"""

import importlib

import numpy as np
import pytest
import torch

from jaxdiff.evaluation import frechet, mmd, pixels
from jaxdiff.evaluation.features import open_network
from jaxdiff.evaluation.frechet import Gaussian, Moments
from jaxdiff.evaluation.neighbours import support
from jaxdiff.evaluation.resize import resize
from jaxdiff.evaluation.scores import inception_score

CLOSE = 1e-10


def oracle(name: str):
    """A module of another library; its test is skipped where that is not installed.

    torchvision beside another build of torch has no operators, and says so when it is imported: what is compared here
    needs none.
    """
    register = torch.library.register_fake

    def tolerant(*args, **kwargs):
        decorate = register(*args, **kwargs)

        def apply(function):
            try:
                return decorate(function)
            except RuntimeError:
                return function

        return apply

    torch.library.register_fake = tolerant
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name.split('.')[0]} is not installed ({error.name or error})")
    finally:
        torch.library.register_fake = register


@pytest.fixture(scope="module")
def sets():
    """Two sets of 300 features of 24 dimensions, in float64, as all libraries take them."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24)) / 5
    return np.abs(rng.normal(size=(300, 24)) @ mix), np.abs(1.2 * rng.normal(size=(300, 24)) @ mix + 0.1)


@pytest.mark.parametrize("library", ["pytorch_fid", "cleanfid", "torch_fidelity", "torchmetrics"])
def test_the_frechet_distance(sets, library):
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in sets)
    if library == "pytorch_fid":
        want = oracle("pytorch_fid.fid_score").calculate_frechet_distance(m1, s1, m2, s2)
    elif library == "cleanfid":
        want = oracle("cleanfid.fid").frechet_distance(m1, s1, m2, s2)
    elif library == "torch_fidelity":
        module = oracle("torch_fidelity.metric_fid")
        found = module.fid_statistics_to_metric({"mu": m1, "sigma": s1}, {"mu": m2, "sigma": s2}, False)
        want = found["frechet_inception_distance"]
    else:
        want = oracle("torchmetrics.image.fid")._compute_fid(*map(torch.tensor, (m1, s1, m2, s2))).item()
    assert frechet.frechet(*sets) == pytest.approx(want, rel=CLOSE)
    of_moments = (Gaussian.of_moments(Moments.of(x)) for x in sets)
    assert frechet.frechet_distance(*of_moments) == pytest.approx(want, rel=CLOSE)


@pytest.mark.parametrize("library", ["cleanfid", "torch_fidelity", "torchmetrics"])
def test_kid_of_a_subset_that_is_all(sets, library):
    if library == "cleanfid":
        want = oracle("cleanfid.fid").kernel_distance(*sets, num_subsets=1, max_subset_size=300)
    elif library == "torch_fidelity":
        settings = {"kid_subsets": 2, "kid_subset_size": 300, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
        settings |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
        found = oracle("torch_fidelity.metric_kid").kid_features_to_metric(*map(torch.tensor, sets), **settings)
        want = found["kernel_inception_distance_mean"]
    else:
        want = oracle("torchmetrics.image.kid").poly_mmd(*map(torch.tensor, sets)).item()
    assert mmd.kid(*sets) == pytest.approx(want, rel=CLOSE)
    assert mmd.kid_by_subsets(*sets, subsets=1, size=300).mean == pytest.approx(want, rel=CLOSE)


def test_precision_recall_density_and_coverage(sets):
    judged, real = sets
    ours = support(judged, real, 5, 5)
    want = oracle("prdc").compute_prdc(real, judged, 5)
    for name, value in want.items():
        assert getattr(ours, name) == pytest.approx(value, rel=CLOSE), name


def test_precision_and_recall_of_torch_fidelity(sets):
    judged, real = sets
    module = oracle("torch_fidelity.metric_prc")
    want = module.prc_features_to_metric(
        *map(torch.tensor, (judged, real)), prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    ours = support(judged, real, 3, 5)
    # Its shares are means in float32 of 300 zeros and ones.
    assert (ours.precision, ours.recall) == pytest.approx([round(300 * want[x]) / 300 for x in ("precision", "recall")])


def test_the_inception_score(sets):
    logits = 5 * sets[0]
    module = oracle("torch_fidelity.metric_isc")
    found = module.isc_features_to_metric(torch.tensor(logits), splits=10, shuffle=False, rng_seed=0)
    want = found["inception_score_mean"], found["inception_score_std"]
    assert inception_score(logits) == pytest.approx(want, rel=CLOSE)


def test_ssim_and_psnr():
    functional = oracle("torchmetrics.functional.image")
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)
    b = (a * 0.7 + rng.uniform(0, 70, a.shape)).astype(np.uint8)
    pair = [torch.tensor(x).permute(0, 3, 1, 2).double() for x in (a, b)]
    _, full = functional.structural_similarity_index_measure(
        *pair, data_range=255.0, reduction="none", return_full_image=True
    )
    inside = full[..., 5:-5, 5:-5].mean((1, 2, 3))  # torchmetrics reflects images at their edges, as the paper does not
    np.testing.assert_allclose(pixels.ssim(a, b), inside.numpy(), rtol=1e-8)
    want = [functional.peak_signal_noise_ratio(x, y, data_range=255.0).item() for x, y in zip(*pair, strict=True)]
    np.testing.assert_allclose(pixels.psnr(a, b), want, rtol=1e-6)  # the range becomes float32 in torchmetrics


@pytest.mark.parametrize("size", [32, 64, 299])
def test_the_legacy_rules_of_resizing(size):
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3)).astype(np.uint8)
    given = torch.tensor(image).permute(0, 3, 1, 2).float()
    want = torch.nn.functional.interpolate(given, (size, size), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize(image, size, "legacy-torch"), want.permute(0, 2, 3, 1).numpy(), atol=2e-3)


@pytest.mark.parametrize("size", [64, 299])
def test_the_rules_of_torch_fidelity_and_clean_fid(size):
    image = np.random.default_rng(0).integers(0, 256, (1, 100, 48, 3)).astype(np.uint8)
    clean = oracle("cleanfid.resize").make_resizer("PIL", False, "bicubic", (size, size))(image[0])
    np.testing.assert_allclose(resize(image, size, "clean")[0], clean.clip(0, 255), atol=2e-3)
    module = oracle("torch_fidelity.interpolate_compat_tensorflow")
    given = torch.tensor(image).permute(0, 3, 1, 2).float()
    want = module.interpolate_bilinear_2d_like_tensorflow1x(given, (size, size), align_corners=False)
    np.testing.assert_allclose(resize(image, size, "legacy-tf"), want.permute(0, 2, 3, 1).numpy(), atol=2e-3)


@pytest.fixture(scope="module")
def inception():
    """FID's network with random weights, and pytorch-fid's module."""
    module, networks = oracle("pytorch_fid.inception"), oracle("torchvision.models")
    net = networks.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    generator = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.3, generator=generator)
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    weights = net.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: weights)  # in place of a download
        yield module, module.fid_inception_v3().eval(), weights


@pytest.mark.parametrize("rule", ["clean", "legacy-torch"])
def test_inception_of_random_weights(inception, tmp_path, figures, rule):
    module, net, weights = inception
    path = tmp_path / "pt_inception.pth"
    torch.save(weights, path)
    size = 299 if rule == "clean" else 120
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    given = torch.tensor(images).permute(0, 3, 1, 2).float()
    seen = open_network("inception", path, rule).look(images)
    with torch.no_grad():
        if rule == "clean":
            pooled = {}
            hook = net.avgpool.register_forward_hook(lambda _, __, out: pooled.update(features=out[:, :, 0, 0]))
            pairs = [(seen.logits, net((given - 128) / 128))]
            hook.remove()
            pairs.append((seen.features, pooled["features"]))
        else:  # all that pytorch-fid does, with its resizing
            pairs = [(seen.features, module.InceptionV3().eval()(given / 255)[0][:, :, 0, 0])]
    for ours, theirs in pairs:
        error = np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs.numpy())
        figures[f"InceptionV3, {rule}: {ours.shape[1]} numbers"] = error
        assert error < 1e-5
