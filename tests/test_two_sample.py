"""Classifiers tell different sets apart as often as they should, and equal ones no more often than chance."""

import numpy as np
import pytest
from scipy import stats

from jaxdiff.evaluation import mmd
from jaxdiff.evaluation.pixel_adversary import pixel_test
from jaxdiff.evaluation.two_sample import (
    Verdict,
    control,
    detectable,
    logistic_test,
    nearest_neighbour_test,
    power,
)


def features(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, 5)) + shift).astype(np.float32)


TESTS = {
    "1-NN": lambda x, y, seed: nearest_neighbour_test(x, y, permutations=400, seed=seed).p,
    "logistic": lambda x, y, seed: logistic_test(x, y, permutations=400, seed=seed).p,
    "MMD": lambda x, y, seed: mmd.mmd_test(x, y, permutations=200, seed=seed).p,
    "KID": lambda x, y, seed: mmd.permutation_test(x, y, mmd.polynomial(5), permutations=200, seed=seed).p,
}


@pytest.mark.parametrize(
    "name", ["1-NN", "logistic", *(pytest.param(x, marks=pytest.mark.slow) for x in ("MMD", "KID"))]
)
def test_real_against_real_gives_uniform_p_values(name):
    found, uniform = control(TESTS[name], features(160, 1), splits=200)
    assert len(found) == 200
    assert uniform > 0.01
    assert 0 <= np.mean(found < 0.05) < 0.1


@pytest.mark.parametrize(("test", "n"), [(nearest_neighbour_test, 600), (logistic_test, 3000)])
def test_different_sets_are_told_apart_and_the_accuracy_is_that_of_the_difference(test, n):
    # Two normal distributions 2 sigma apart in one direction: the best classifier is right with Phi(1).
    x, y = features(n, 1), features(n, 2)
    y[:, 0] += 2
    found = test(x, y, permutations=1000)
    assert found.p == 1 / 1001
    best = stats.norm.cdf(1)
    assert best - 0.12 < found.accuracy < best + 0.03
    if test is logistic_test:
        assert found.auc == pytest.approx(stats.norm.cdf(2**0.5), abs=0.03)
        assert found.tested == 3000


def test_a_logistic_regression_with_more_features_than_images_is_no_matter():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 300)), rng.normal(size=(40, 300)) + 0.3
    assert logistic_test(x, y).p < 0.01
    x[:, 5] = y[:, 5] = 1.0  # a feature that says nothing
    assert np.isfinite(logistic_test(x, y).accuracy)


@pytest.mark.parametrize("test", [nearest_neighbour_test, logistic_test])
def test_prompts_in_pairs_make_no_difference_where_there_is_none(test):
    def p(x, y, seed):
        return test(x, y, paired=True, permutations=300, seed=seed).p

    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        prompts = 3 * rng.normal(size=(40, 3))
        found.append(p(prompts + rng.normal(size=(40, 3)), prompts + rng.normal(size=(40, 3)), seed))
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_the_power_is_as_often_as_a_binomial_test_finds_it():
    for accuracy, tested in ((0.55, 442), (0.52, 1000), (0.6, 200)):
        # The smallest number of right answers that is too many at 5 %.
        limit = stats.binom.ppf(0.95, tested, 0.5) + 1
        assert power(accuracy, tested) == pytest.approx(stats.binom.sf(limit - 1, tested, accuracy), abs=0.05)
    assert power(0.5, 100) == pytest.approx(0.05)
    assert power(detectable(400), 400) == pytest.approx(0.8, abs=0.02)
    assert Verdict(0.6, 0.6, 0.1, 100).power == power(0.6, 100)
    with pytest.raises(ValueError, match="accuracy is 1"):
        power(1.0, 10)


def test_the_power_is_as_often_as_the_regression_finds_a_difference():
    """A shift d has the accuracy Phi(d / 2), and with one feature and many images the regression comes close to it."""
    accuracy, tested, tries = 0.6, 200, 100
    shift = 2 * stats.norm.ppf(accuracy)
    found = 0
    for seed in range(tries):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(tested, 1)), rng.normal(size=(tested, 1)) + shift
        verdict = logistic_test(x, y, permutations=400, seed=seed)
        right = round(verdict.accuracy * verdict.tested)
        found += stats.binomtest(right, verdict.tested, 0.5, alternative="greater").pvalue <= 0.05
    assert found / tries == pytest.approx(power(accuracy, tested), abs=0.12)


@pytest.mark.slow
def test_a_network_finds_what_lies_in_the_pixels_and_nothing_where_there_is_nothing():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 60, 20, 24, 3)).astype(np.uint8)
    assert pixel_test(noise[0], noise[1]).p > 0.02
    smooth = (noise[2] // 2 + np.roll(noise[2], 1, axis=2) // 2).astype(np.uint8)
    assert pixel_test(noise[0], smooth).p < 0.01
    with pytest.raises(ValueError, match="24x20 and 20x20, by which any network"):
        pixel_test(noise[0], noise[1][:, :, :20])
