"""LPIPS and the adversary of the first stage against PyTorch, and LPIPS against its authors' package."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from jaxdiff.config import AdversaryConfig, LPIPSConfig
from jaxdiff.evaluation import lpips
from jaxdiff.models.lpips import BACKBONES, LPIPS, MEAN, STD
from jaxdiff.models.patchgan import PatchDiscriminator
from jaxdiff.training.adversary import LOSSES, r1_penalty
from jaxdiff.training.state import apply

RNG = np.random.default_rng(0)


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
    ours = jax.jit(jax.value_and_grad(lambda p, b: apply(net, p, jnp.asarray(a), b).sum(), argnums=1))
    total, gradient = ours(params, jnp.asarray(b))
    wanted = x.grad.numpy().transpose(0, 2, 3, 1)
    figures[f"LPIPS {backbone}, real weights {real}"] = error = abs(float(total) / float(want.sum()) - 1)
    assert error < 1e-5
    # In the mean: a feature that rounding takes across ReLU's kink moves the gradient of its patch.
    assert np.linalg.norm(gradient - wanted) < 2e-3 * np.linalg.norm(wanted)


def layers_of(backbone):
    """What torchvision calls the features of its classifier."""
    made, channels = [], 3
    for layer in BACKBONES[backbone]:
        made += [torch.nn.MaxPool2d(layer.pool, 2)] if layer.pool else []
        made += [torch.nn.Conv2d(channels, layer.channels, layer.kernel, layer.stride, layer.padding), torch.nn.ReLU()]
        channels = layer.channels
    return SimpleNamespace(features=torch.nn.Sequential(*made))


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_the_authors_package(backbone, folder, figures, monkeypatch):
    """With the same weights; it takes layers from torchvision, of which nothing else is needed."""
    models = SimpleNamespace(alexnet=lambda **_: layers_of("alex"), vgg16=lambda **_: layers_of("vgg"))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    why = "pip install --no-deps lpips: it asks for torchvision, whose build must be torch's own"
    theirs = pytest.importorskip("lpips", reason=why, exc_type=ImportError)
    params = real_params(backbone, folder)
    metric = theirs.LPIPS(net=backbone, pnet_rand=True, verbose=False).eval()
    convs = [module for module in metric.net.modules() if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for conv, ours in zip(convs, params["backbone"].values(), strict=True):
            conv.weight.copy_(oihw(ours["kernel"]))
            conv.bias.copy_(torch.tensor(ours["bias"]))
    for i in range(5):  # the weights that the package ships are ours to the bit
        np.testing.assert_array_equal(metric.lins[i].model[-1].weight.detach().numpy().ravel(), params[f"weight_{i}"])
    a, b = RNG.uniform(-1, 1, (2, 2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        want = metric(nchw(a), nchw(b)).numpy().ravel()
    error = float(np.abs(np.asarray(lpips.compiled_lpips(backbone)(params, a, b)) / want - 1).max())
    figures[f"LPIPS {backbone} against its package"] = error
    assert error < 1e-5


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
        return LOSSES["hinge"].discriminator(on_real, apply(net, params, jnp.asarray(made))) + 5 * found

    value, grads = jax.jit(jax.value_and_grad(against))(params)
    assert float(value) == pytest.approx(float(hinge + 5 * penalty), rel=1e-5)
    for name, (kernel, bias) in zip(params, weights, strict=True):
        want = kernel.grad.numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(grads[name]["kernel"], want, atol=2e-5 * np.abs(want).max(), err_msg=name)
        np.testing.assert_allclose(grads[name]["bias"], bias.grad.numpy(), atol=2e-5 * abs(bias.grad).max().item())
