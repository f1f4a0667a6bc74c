"""Measures of sets of features have their closed forms and invariances."""

import json
from math import exp

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from jaxdiff.evaluation import frechet, mmd, pixels
from jaxdiff.evaluation.blocks import check_sets
from jaxdiff.evaluation.comparison import Comparison, measures
from jaxdiff.evaluation.extractor import Seen
from jaxdiff.evaluation.frechet import Gaussian, Moments, frechet_distance, frechet_infinity
from jaxdiff.evaluation.neighbours import nearest_neighbour, radii, support
from jaxdiff.evaluation.resize import resize, resize_matrix
from jaxdiff.evaluation.scores import clip_score, inception_score


def drawn(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Correlated normal features, float32 as a network gives them."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / d**0.5
    return (scale * rng.normal(size=(n, d)) @ mix + shift).astype(np.float32)


# Frechet --------------------------------------------------------------------------------------------------------------


def test_the_distance_of_two_normal_distributions_is_the_closed_form():
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    gaussians = Gaussian(9, np.zeros(3), np.diag(a)), Gaussian(9, mean, np.diag(b))
    assert frechet_distance(*gaussians) == pytest.approx(np.square(mean).sum() + np.square(a - b).sum(), rel=1e-12)


def test_the_distance_of_correlated_sets_is_that_of_the_matrix_square_root():
    a, b = drawn(400, 12, 1), drawn(300, 12, 2, 0.3, 1.5)
    s_a, s_b = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(s_a)
    between = scipy.linalg.sqrtm(root @ s_b @ root)
    apart = np.square(a.astype(np.float64).mean(0) - b.astype(np.float64).mean(0)).sum()
    assert frechet.frechet(a, b) == pytest.approx(apart + np.trace(s_a + s_b - 2 * between), rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(200, 10), (30, 40)])
def test_the_distance_is_symmetric_and_minds_no_rotation_or_shift_and_is_0_to_itself(n, d):
    a, b = (x.astype(np.float64) for x in (drawn(n, d, 1), drawn(n + 7, d, 2, 0.2)))
    distance = frechet.frechet(a, b)
    assert frechet.frechet(b, a) == pytest.approx(distance, rel=1e-10)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(d, d)))[0]
    assert frechet.frechet(a @ turn + 5, b @ turn + 5) == pytest.approx(distance, rel=1e-8)
    assert frechet.frechet(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-10)
    assert frechet.frechet(a, a) <= 1e-10 * np.trace(np.cov(a.T))


def test_few_pictures_have_the_distance_of_their_moments():
    a, b = drawn(20, 30, 1), drawn(25, 30, 2)
    of_moments = frechet_distance(*(Gaussian.of_moments(Moments.of(x)) for x in (a, b)))
    assert frechet.frechet(a, b) == pytest.approx(of_moments, rel=1e-6)  # the covariances are singular


def test_moments_are_the_same_in_any_parts():
    x = drawn(1000, 6, 1, shift=100.0)
    whole = Moments.of(x)
    parts = Moments.streamed(np.split(x, [1, 2, 500, 999]))
    for moments in (whole, parts, Moments.of(x[:300]) + Moments.of(x[300:])):
        assert moments.count == 1000
        np.testing.assert_allclose(moments.mean, x.mean(0, dtype=np.float64), rtol=1e-13)
        np.testing.assert_allclose(moments.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="no features"):
        Moments.streamed([])


def test_the_limit_of_a_distance_is_that_of_the_distributions_where_the_distance_itself_is_too_large():
    truth = np.square(np.full(8, 0.3)).sum()
    found, limits = [], []
    for seed in range(20):
        a, b = drawn(400, 8, 2 * seed), drawn(400, 8, 2 * seed + 1, shift=0.3)
        line = frechet_infinity(a, b, seed)
        found.append(line.distances[-1])
        limits.append(line.infinity)
        assert line.sizes[-1] == 400
        assert line.distances[-1] == pytest.approx(frechet.frechet(a, b), rel=1e-9)
    error = np.std(limits) / len(limits) ** 0.5
    assert abs(np.mean(limits) - truth) < 3 * error
    assert np.mean(found) - truth > 3 * np.std(found) / len(found) ** 0.5


def test_the_standard_error_is_the_spread_of_other_draws():
    found = [frechet.frechet(drawn(300, 4, 2 * i, 0.5), drawn(300, 4, 2 * i + 1)) for i in range(200)]

    def distance(a, b):
        return [frechet.frechet(a, b)]

    errors = [frechet.standard_errors(distance, drawn(300, 4, 2 * i, 0.5), drawn(300, 4, 2 * i + 1), 40, i)
              for i in range(10)]  # fmt: skip
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.3)


def test_the_floor_is_what_equal_distributions_have():
    same = [frechet.above_floor(drawn(100, 6, 3 * i), drawn(220, 6, 3 * i + 1), i) for i in range(30)]
    assert all(floor.count == 100 for floor in same)
    differences = np.array([floor.distance - floor.floor for floor in same])
    assert abs(differences.mean()) < 3 * differences.std() / 30**0.5
    worse = frechet.above_floor(drawn(100, 6, 1, shift=1.0), drawn(220, 6, 2))
    assert worse.distance > worse.floor + 5


def test_principal_components_are_those_of_the_largest_variance():
    x = drawn(300, 6, 1)
    projected = frechet.principal(x, 3)(x)
    covariance = np.cov(projected.T)
    variances = np.sort(np.linalg.eigvalsh(np.cov(x.T.astype(np.float64))))[::-1]
    np.testing.assert_allclose(covariance, np.diag(variances[:3]), atol=1e-6 * variances[0])
    with pytest.raises(ValueError, match="from 1 to 5"):
        frechet.principal(x, 6)


# Maximum mean discrepancy ---------------------------------------------------------------------------------------------


def test_kid_is_the_double_sum():
    x, y = (s.astype(np.float64) for s in (drawn(30, 5, 1), drawn(40, 5, 2, 0.4)))

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    want = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert mmd.kid(x, y) == pytest.approx(want, rel=1e-10)


def test_kid_of_subsets_that_are_all_is_exact():
    x, y = (s.astype(np.float64) for s in (drawn(60, 5, 1), drawn(60, 5, 2, 0.4)))
    by_subsets = mmd.kid_by_subsets(x, y, subsets=3, size=60)
    assert by_subsets.mean == pytest.approx(mmd.kid(x, y), rel=1e-10)
    assert by_subsets.deviation < 1e-12
    single = mmd.kid_by_subsets(x.astype(np.float32), y.astype(np.float32), subsets=1, size=60)
    assert single.mean == pytest.approx(by_subsets.mean, rel=1e-5)
    with pytest.raises(ValueError, match="size is 1000"):
        mmd.kid_by_subsets(x, y)


def test_a_set_and_itself_have_no_biased_discrepancy_and_blocks_change_nothing():
    x = drawn(2100, 3, 1)  # more than a block
    kernel = mmd.gaussian(1.5)
    assert abs(mmd.mmd2(x, x, kernel, biased=True)) < 1e-12
    few, others = x[:2090], drawn(2100, 3, 2, 0.3)
    pooled = mmd.Pooled(few[:50], others[:50], kernel)
    assert pooled.mmd2(*pooled.own())[0] == pytest.approx(mmd.mmd2(few[:50], others[:50], kernel), rel=1e-9)
    distances = np.square(few[:, None, 0].astype(np.float64) - few[None, :, 0])
    want = (np.exp(distances / -4.5).sum() - len(few)) / (len(few) * (len(few) - 1))
    assert mmd._within(few[:, :1], kernel, False) == pytest.approx(want, rel=1e-10)


def test_the_discrepancy_of_two_normal_distributions_is_the_closed_form():
    d, sigma, shift, scale = 3, 1.2, 0.7, 1.4
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        x, y = rng.normal(size=(400, d)), shift + scale * rng.normal(size=(400, d))
        found.append(mmd.mmd2(x, y, mmd.gaussian(sigma)))

    def expected(variance, apart):
        total = sigma**2 + variance
        return (sigma**2 / total) ** (d / 2) * exp(-apart / (2 * total))

    want = expected(2, 0) + expected(2 * scale**2, 0) - 2 * expected(1 + scale**2, d * shift**2)
    assert abs(np.mean(found) - want) < 3 * np.std(found) / len(found) ** 0.5 < 0.1 * want


def test_cmmd_minds_directions_alone_and_is_the_papers_formula():
    x, y = drawn(40, 6, 1, 0.2), drawn(50, 6, 2)
    assert mmd.cmmd(x, y) == pytest.approx(mmd.cmmd(3 * x, 0.5 * y), rel=1e-6)
    a, b = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (x.astype(np.float64), y.astype(np.float64)))

    def mean(p, q):
        return np.exp(-np.square(p[:, None] - q[None]).sum(-1) / 200).mean()

    assert mmd.cmmd(x, y) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-8)


def test_the_bootstrap_of_kid_has_the_spread_of_other_draws():
    found = [mmd.kid(drawn(100, 4, 2 * i, 0.5), drawn(100, 4, 2 * i + 1)) for i in range(150)]
    kernel = mmd.polynomial(4)
    errors = [mmd.permutation_test(drawn(100, 4, 2 * i, 0.5), drawn(100, 4, 2 * i + 1), kernel, permutations=10).error
              for i in range(10)]  # fmt: skip
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.3)


def test_a_difference_is_found_and_prompts_in_pairs_hide_none():
    rng = np.random.default_rng(0)
    prompts = 3 * rng.normal(size=(80, 4))  # what is drawn differs far more than how it is drawn
    x, y = prompts + 0.3 * rng.normal(size=(80, 4)), prompts + 0.3 * rng.normal(size=(80, 4)) + 0.3
    assert mmd.permutation_test(x, y, mmd.gaussian(10.0)).p > 0.1
    assert mmd.permutation_test(x, y, mmd.gaussian(10.0), paired=True).p < 0.01
    assert mmd.mmd_test(drawn(200, 4, 1), drawn(200, 4, 2, 0.6)).p < 0.01
    with pytest.raises(ValueError, match="80 and 79 images"):
        mmd.permutation_test(x, y[:-1], mmd.gaussian(1.0), paired=True)


# Neighbours -----------------------------------------------------------------------------------------------------------


def brute(judged, real, k):
    def distances(a, b):
        return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=-1)

    own = [np.sort(distances(s, s), axis=1)[:, k] for s in (judged, real)]
    across = distances(real, judged)
    inside = across <= own[1][:, None]
    precision, recall = inside.any(0).mean(), (across <= own[0]).any(1).mean()
    return precision, recall, inside.sum() / (k * len(judged)), inside.any(1).mean()


def test_precision_recall_density_and_coverage_are_their_definitions():
    judged, real = drawn(70, 3, 1, 0.5), drawn(60, 3, 2)
    for k in (1, 3, 5):
        np.testing.assert_allclose(support(judged, real, k, k), brute(judged, real, k), rtol=1e-12)


def test_swapped_sets_swap_precision_and_recall():
    judged, real = drawn(90, 3, 1, 0.8, 0.5), drawn(60, 3, 2)
    one, other = support(judged, real), support(real, judged)
    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert one.precision != one.recall


def test_equal_sets_have_everything_and_distant_ones_nothing():
    x = drawn(50, 3, 1)
    assert support(x, x)[:2] == (1, 1)
    assert support(x, x).coverage == 1
    assert support(x + 1000, x) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="has 5 images; this measure needs at least 6"):
        support(x[:5], x)


def test_neighbours_are_found_over_blocks():
    x = drawn(2100, 2, 1)
    distances = np.linalg.norm(x[:, None].astype(np.float64) - x[None], axis=-1)
    ordered = np.sort(distances, axis=1)
    one, three = radii(x, 1, 3)
    np.testing.assert_allclose(np.sqrt(one), ordered[:, 1], atol=1e-7)
    np.testing.assert_allclose(np.sqrt(three), ordered[:, 3], atol=1e-7)
    np.fill_diagonal(distances, np.inf)
    assert (nearest_neighbour(x) == distances.argmin(1)).all()
    partners = distances.argmin(1)
    distances[np.arange(2100), partners] = np.inf
    assert (nearest_neighbour(x, partners) == distances.argmin(1)).all()


# Scores of one set ----------------------------------------------------------------------------------------------------


def test_the_inception_score_goes_from_1_to_the_number_of_classes():
    assert inception_score(np.zeros((50, 7)), splits=5) == pytest.approx((1, 0))
    sure = 1000 * np.eye(7)[np.arange(70) % 7]
    assert inception_score(sure, splits=1).mean == pytest.approx(7)
    with pytest.raises(ValueError, match="splits is 10"):
        inception_score(np.zeros((9, 7)))


def test_the_clip_score_is_of_angles():
    images, texts = np.array([[2.0, 0], [1, 1], [1, 0]]), np.array([[5.0, 0], [0, 3], [-1, 0]])
    np.testing.assert_allclose(clip_score(images, texts), [2.5, 2.5 * 0.5**0.5, 0], atol=1e-12)


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_of_known_pairs():
    grey = np.full((1, 16, 20, 3), 100, np.uint8)
    assert pixels.psnr(grey, grey + 5)[0] == pytest.approx(20 * np.log10(255 / 5))
    assert np.isinf(pixels.psnr(grey, grey)[0])
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3)).astype(np.uint8)
    np.testing.assert_allclose(pixels.ssim(noise, noise), 1, atol=1e-12)
    c = (0.01 * 255) ** 2
    assert pixels.ssim(grey, grey + 50)[0] == pytest.approx((2 * 100 * 150 + c) / (100**2 + 150**2 + c))
    assert (pixels.ssim(noise, 255 - noise) < 0).all()
    with pytest.raises(ValueError, match="needs 11 pixels"):
        pixels.ssim(noise[:, :10], noise[:, :10])


def test_white_noise_has_its_variance_at_every_frequency():
    noise = np.random.default_rng(0).integers(0, 256, (200, 24, 32, 1)).astype(np.uint8)
    spectrum = pixels.radial_spectrum(np.repeat(noise, 3, axis=-1))
    np.testing.assert_allclose(spectrum.power[1:], 1 / 12, rtol=0.1)
    assert spectrum.top_octave == pytest.approx(1 / 12, rel=0.05)


def test_a_wave_is_at_its_frequency_and_blur_takes_the_fine_ones():
    x = np.arange(64)
    wave = (128 + 100 * np.cos(2 * np.pi * x * 12 / 64)).astype(np.uint8)
    image = np.broadcast_to(wave[None, None, :, None], (1, 64, 64, 3))
    spectrum = pixels.radial_spectrum(image)
    assert spectrum.frequencies[spectrum.power.argmax()] == pytest.approx(12 / 64, abs=1 / 64)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    small = Image.fromarray(noise).resize((32, 32), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BICUBIC)
    powers = [pixels.radial_spectrum(np.asarray(i)[None]).top_octave for i in (small, noise)]
    assert powers[0] < 0.1 * powers[1]


@pytest.mark.parametrize("size", [24, 64, 90])
def test_the_clean_rule_is_pillows_resizing_in_floating_point(size):
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3)).astype(np.uint8)
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    want = [np.asarray(c.resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
    np.testing.assert_allclose(resize(image[None], size)[0], np.stack(want, -1).clip(0, 255), atol=2e-3)


def test_resizing_keeps_sizes_and_plain_colours_and_the_legacy_rules_are_where_their_libraries_are():
    image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    plain = np.full((1, 10, 20, 3), 77, np.uint8)
    for rule in ("clean", "legacy-torch", "legacy-tf"):
        np.testing.assert_allclose(resize(image, 16, rule), image, atol=1e-4)
        np.testing.assert_allclose(resize(plain, 13, rule), 77, atol=1e-4)
    np.testing.assert_allclose(resize_matrix(2, 4, "legacy-tf") @ [0, 1], [0, 0.5, 1, 1])
    np.testing.assert_allclose(resize_matrix(2, 4, "legacy-torch") @ [0, 1], [0, 0.25, 0.75, 1])


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["none", "prompts"])
def test_a_comparison_is_a_table_and_json(pairs):
    def seen(seed, shift=0.0):
        return Seen(drawn(80, 6, seed, shift), np.random.default_rng(seed).normal(size=(80, 5)).astype(np.float32))

    rows = list(measures(seen(1, 0.8), seen(2), pairs=pairs, bootstrap=3))
    found = Comparison("a", "b", 80, 80, "features", 6, pairs, rows)
    assert json.loads(json.dumps(found.record(), allow_nan=False))["rows"][0]["name"] == "FD"
    assert len(found.table().splitlines()) == 3 + len(rows)
    by_name = {row.name: row for row in rows}
    for name in ("KID", "told apart by 1-NN", "told apart by regression", "MMD, sigma learnt"):
        assert by_name[name].p < 0.05, name
    same = {row.name: row for row in measures(seen(3), seen(4), pairs=pairs, bootstrap=0)}
    assert same["FD"].error is None
    assert same["FD"].value < by_name["FD"].value
    assert next(iter(measures(seen(1), seen(2), dimensions=3, bootstrap=0))).name == "FD, 3 components"


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), "4 and 5 dimensions"),
        (np.zeros((1, 4)), np.zeros((3, 4)), "first set has 1 images"),
        (np.zeros((3, 4)), np.full((3, 4), np.nan), "second set of features has values that are not finite"),
        (np.zeros((3, 4), int), np.zeros((3, 4)), "int64"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(a, b, problem):
    with pytest.raises(ValueError, match=problem):
        check_sets(a, b)
