"""Strengths of models are those of `choix`, run live."""

import numpy as np
import pytest

from jaxdiff.evaluation.pairwise import davidson

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("models", [2, 3, 6])
def test_strengths_without_ties_are_those_of_choix(models):
    choix = pytest.importorskip("choix")
    counts = np.random.default_rng(models).integers(1, 30, (models * (models - 1) // 2, 3)).astype(float)
    counts[:, 2] = 0
    data = []
    for (i, j), (wins, losses, _) in zip(np.stack(np.triu_indices(models, 1), 1), counts, strict=True):
        data += [(i, j)] * int(wins) + [(j, i)] * int(losses)
    got = davidson(counts, models).b
    np.testing.assert_allclose(got, choix.ilsr_pairwise(models, data, alpha=0, tol=1e-12), atol=1e-8)
    np.testing.assert_allclose(got, choix.opt_pairwise(models, data, alpha=0, tol=1e-10), atol=1e-5)
