"""Activations are what the literature says that they are, and so are their derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.nn.layers import ACTIVATIONS


def by_tanh(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMS = {
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": by_tanh,
    "gelu_pytorch_tanh": by_tanh,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_formula(name):
    f, points, h = FORMS[name], np.linspace(-4, 4, 20), 1e-5
    activation = ACTIVATIONS[name]
    np.testing.assert_allclose(activation(jnp.asarray(points, "float32")), [f(x) for x in points], atol=1e-6)
    slopes = jax.vmap(jax.grad(activation))(jnp.asarray(points, "float32"))
    np.testing.assert_allclose(slopes, [(f(x + h) - f(x - h)) / (2 * h) for x in points], atol=1e-5)
