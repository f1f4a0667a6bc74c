"""LPIPS and the adversary of the first stage against PyTorch, and LPIPS against its authors' package and figures."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional

from jaxdiff.config import AdversaryConfig, LPIPSConfig
from jaxdiff.evaluation import lpips
from jaxdiff.models.lpips import BACKBONES, LPIPS, MEAN, STD
from jaxdiff.models.patchgan import PatchDiscriminator
from jaxdiff.training.adversary import LOSSES, r1_penalty
from jaxdiff.training.state import apply

RNG = np.random.default_rng(0)
PUBLISHED = {"alex": (0.722, 0.138), "vgg": (0.569, 0.422)}
"""Of ex_ref.png against ex_p0.png and ex_p1.png: what the authors' package gives, to three digits."""


def oihw(kernel):
    return torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1))


def torch_lpips(backbone, params, a, b):
    """Zhang et al. 2018, eq. 1, for images in NCHW."""

    def features(x):
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        for i, layer in enumerate(BACKBONES[backbone]):
            if layer.pool:
                x = functional.max_pool2d(x, layer.pool, 2)
            conv = params["backbone"][f"conv_{i}"]
            kernel, bias = oihw(conv["kernel"]), torch.tensor(conv["bias"])
            x = functional.relu(functional.conv2d(x, kernel, bias, layer.stride, layer.padding))
            if layer.compared:
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    pairs = zip(features(a), features(b), strict=True)
    weights = (torch.tensor(params[f"weight_{i}"])[:, None, None] for i in range(5))
    return sum((w * (p - q).square()).sum(1).mean((1, 2)) for w, (p, q) in zip(weights, pairs, strict=True))


def nchw(x, grad=False):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2)).requires_grad_(grad)


def real_params(backbone, folder):
    try:
        lpips.fetch(folder, folder)
    except ValueError as error:
        pytest.skip(str(error))
    return lpips.read_lpips(folder, backbone)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lpips")


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_distances_and_their_gradients(backbone, real, folder, figures):
    drawn = tiny.random_params("lpips", LPIPSConfig(backbone=backbone), RNG)
    params = real_params(backbone, folder) if real else drawn
    a, b = RNG.uniform(-1, 1, (2, 3, 64, 77, 3)).astype(np.float32)
    x = nchw(b, grad=True)
    want = torch_lpips(backbone, params, nchw(a), x)
    want.sum().backward()
    net = LPIPS(backbone)
    ours = jax.jit(jax.value_and_grad(lambda p, b: apply(net, p, a, b).sum(), argnums=1))
    total, gradient = ours(params, b)
    wanted = x.grad.numpy().transpose(0, 2, 3, 1)
    figures[f"LPIPS {backbone}, real weights {real}"] = error = abs(float(total) / float(want.sum()) - 1)
    assert error < 1e-5
    np.testing.assert_allclose(gradient, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_the_authors_package_and_its_reference_pair(backbone, folder, figures):
    """Its networks are torchvision's, of which the layers are made here, with the same weights in them."""
    theirs = pytest.importorskip("lpips", exc_type=ImportError)
    params = real_params(backbone, folder)
    metric = theirs.LPIPS(net=backbone, pretrained=True, pnet_rand=True, verbose=False).eval()
    convs = [m for m in metric.net.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        for i, conv in enumerate(convs):
            conv.weight.copy_(oihw(params["backbone"][f"conv_{i}"]["kernel"]))
            conv.bias.copy_(torch.tensor(params["backbone"][f"conv_{i}"]["bias"]))
        for i in range(5):  # the layers that the package ships are ours to the bit
            np.testing.assert_array_equal(metric.lins[i].model[-1].weight.numpy().ravel(), params[f"weight_{i}"])
    distance = lpips.compiled_lpips(backbone)
    a, b = RNG.uniform(-1, 1, (2, 2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        want = metric(nchw(a), nchw(b)).numpy().ravel()
    figures[f"LPIPS {backbone} against its package"] = error = float(np.abs(distance(params, a, b) / want - 1).max())
    assert error < 1e-5

    pictures = [Path(theirs.__file__).parents[1] / "imgs" / f"ex_{name}.png" for name in ("ref", "p0", "p1")]
    if not all(path.exists() for path in pictures):
        pytest.skip("the package was installed without its pictures")
    ref, *others = (np.asarray(Image.open(path).convert("RGB"))[None] for path in pictures)
    for other, published in zip(others, PUBLISHED[backbone], strict=True):
        assert lpips.open_lpips(folder, backbone)(ref, other)[0] == pytest.approx(published, abs=1e-3)


def test_verdicts_losses_and_the_penaltys_gradients():
    """PyTorch's differentiate the gradient once more (`create_graph`)."""
    config = AdversaryConfig(channels=4, layers=2)
    params = tiny.random_params("discriminator", config, RNG)
    for conv in params.values():
        conv["bias"] = RNG.normal(size=conv["bias"].shape).astype(np.float32)
    real, made = RNG.uniform(-1, 1, (2, 3, 24, 32, 3)).astype(np.float32)
    weights = [
        (oihw(conv["kernel"]).requires_grad_(), torch.tensor(conv["bias"]).requires_grad_()) for conv in params.values()
    ]

    def judge(x):
        for i, (kernel, bias) in enumerate(weights):
            x = functional.conv2d(x, kernel, bias, 2 if i < 2 else 1, 1)
            x = functional.leaky_relu(x, 0.2) if i < 3 else x
        return x

    x = nchw(real, grad=True)
    verdicts = judge(x)
    (slope,) = torch.autograd.grad(verdicts.sum(), x, create_graph=True)
    penalty = slope.square().sum((1, 2, 3)).mean() / verdicts[0].numel()
    hinge = 0.5 * (functional.relu(1 - verdicts).mean() + functional.relu(1 + judge(nchw(made))).mean())
    (hinge + 5 * penalty).backward()

    net = PatchDiscriminator(4, 2)

    def against(params):
        found, on_real = r1_penalty(partial(apply, net, params), jnp.asarray(real))
        return LOSSES["hinge"].discriminator(on_real, apply(net, params, made)) + 5 * found

    value, grads = jax.jit(jax.value_and_grad(against))(params)
    assert float(value) == pytest.approx(float(hinge + 5 * penalty), rel=1e-5)
    for name, (kernel, bias) in zip(params, weights, strict=True):
        want = kernel.grad.numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(grads[name]["kernel"], want, atol=2e-5 * np.abs(want).max(), err_msg=name)
        np.testing.assert_allclose(grads[name]["bias"], bias.grad.numpy(), atol=2e-5 * abs(bias.grad).max().item())
