"""Choices between models: closed forms, strengths that are known, and intervals that hold them as often as they say."""

import math

import numpy as np
import pytest

from jaxdiff.evaluation.agreement import choice_agreement, krippendorff_alpha
from jaxdiff.evaluation.pairwise import (
    FIRST,
    SECOND,
    TIE,
    Judgements,
    answers_needed,
    bootstrap_errors,
    davidson,
    groups,
    power,
    sign_test,
)


def chances(b: np.ndarray, log_nu: float | np.ndarray = -np.inf) -> np.ndarray:
    """What Davidson's model says of every two models, [..., pairs, 3], written out from its definition."""
    i, j = np.triu_indices(b.shape[-1], 1)
    strengths = np.exp(b)
    both = np.exp(log_nu) * np.sqrt(strengths[..., i] * strengths[..., j])
    table = np.stack([strengths[..., i], strengths[..., j], both], -1)
    return table / table.sum(-1, keepdims=True)


@pytest.mark.parametrize(("wins", "losses", "ties"), [(7, 3, 0), (7, 3, 5), (1, 30, 2), (400, 401, 1000)])
def test_two_models_are_the_logarithm_of_the_odds_apart(wins, losses, ties):
    got = davidson(np.array([[wins, losses, ties]], float), 2)
    np.testing.assert_allclose(got.b[0] - got.b[1], math.log(wins / losses), atol=1e-9)
    np.testing.assert_allclose(got.b.sum(), 0, atol=1e-9)
    np.testing.assert_allclose(np.exp(got.log_nu), ties / math.sqrt(wins * losses), rtol=1e-9)
    assert got.bounded


def test_strengths_are_found_again_from_the_shares_that_they_imply():
    rng = np.random.default_rng(0)
    b = rng.normal(size=(8, 5)) * 1.5
    b -= b.mean(-1, keepdims=True)
    log_nu = rng.normal(size=(8, 1))
    asked = rng.integers(1, 100, (8, 10, 1))
    got = davidson(asked * chances(b, log_nu), 5)
    np.testing.assert_allclose(got.b, b, atol=1e-8)
    np.testing.assert_allclose(got.log_nu, log_nu[:, 0], atol=1e-8)
    one = davidson(asked[3] * chances(b[3], log_nu[3]), 5)
    np.testing.assert_allclose(one.b, got.b[3], atol=1e-12)


def test_at_the_likeliest_strengths_wins_are_as_many_as_expected():
    counts = np.random.default_rng(1).integers(1, 40, (6, 3)).astype(float)
    got = davidson(counts, 4)
    off = counts - counts.sum(-1, keepdims=True) * chances(got.b, got.log_nu)
    score = off[:, [FIRST, SECOND]] + off[:, [TIE]] / 2  # a tie is half a win of both
    by_model = np.zeros(4)
    np.add.at(by_model, np.stack(np.triu_indices(4, 1), 1), score)
    np.testing.assert_allclose(by_model, 0, atol=1e-7)
    np.testing.assert_allclose(off[:, TIE].sum(), 0, atol=1e-7)


@pytest.mark.parametrize(
    ("counts", "bounded"),
    [
        ([[5, 0, 0], [1, 1, 0], [1, 1, 0]], True),  # B beats C, which beats A
        ([[5, 0, 0], [3, 0, 0], [1, 1, 0]], False),  # nobody beats A
        ([[5, 0, 4], [3, 0, 2], [0, 0, 3]], False),
        ([[5, 0, 4], [3, 0, 2], [1, 1, 0]], True),  # B and C never tie, so that ties with A are nearly losses
        ([[0, 0, 9], [0, 0, 9], [0, 0, 9]], False),  # ties alone
        ([[5, 4, 4], [3, 2, 2], [1, 1, 0]], True),
    ],
)
def test_a_model_that_never_loses_has_no_bound(counts, bounded):
    assert bool(davidson(np.array(counts, float), 3).bounded) is bounded


def test_models_that_were_never_compared_are_apart():
    # Of four models the pairs are 01 02 03 12 13 23.
    table = np.zeros((6, 3))
    table[[1, 4], TIE] = 1
    assert groups(table, 4) == [[0, 2], [1, 3]]
    table[5, FIRST] = 1
    assert groups(table, 4) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 9), (60, 40), (8, 8), (0, 20)])
def test_the_sign_test_is_the_sum_of_the_binomial_distribution(wins, losses):
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert sign_test(wins, losses) == sign_test(losses, wins) == pytest.approx(min(1, 2 * tail), rel=1e-12)


def test_power_is_the_chance_that_the_test_rejects():
    share, n = 0.7, 25
    chance = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    want = sum(c for k, c in enumerate(chance) if sign_test(k, n - k) <= 0.05)
    np.testing.assert_allclose(power(np.array([n]), share), want, rtol=1e-12)
    assert power(np.array([1, 4]), 0.9).tolist() == [0, 0], "four answers can never reject at 5 %"


@pytest.mark.parametrize("share", [0.55, 0.6, 0.65, 0.7, 0.75, 0.9])
def test_from_the_answers_needed_on_the_power_suffices_and_just_before_it_does_not(share):
    n = answers_needed(share)
    assert n == answers_needed(1 - share)
    assert power(np.arange(n, 2 * n), share).min() >= 0.8 > power(np.array([n - 1]), share)[0]


def test_even_shares_need_more_answers_than_can_be_had():
    assert answers_needed(0.5) is None
    assert answers_needed(0.501) is None


# Krippendorff's own example (2011): four observers, twelve units.
TABLE = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def test_alpha_of_krippendorffs_table_is_his():
    ratings = np.array([line.split() for line in TABLE.split("\n") if line])
    counts = np.array([[(unit == str(v)).sum() for v in range(1, 6)] for unit in ratings.T], float)
    values = np.arange(1.0, 6)
    assert round(krippendorff_alpha(counts, values), 3) == 0.743
    assert round(krippendorff_alpha(counts, values, "interval"), 3) == 0.849


def test_alpha_is_1_for_those_who_agree_0_for_chance_and_nothing_where_nobody_differs():
    rng = np.random.default_rng(0)
    agreed = np.eye(3)[rng.integers(0, 3, 500)] * 4
    assert choice_agreement(agreed) == 1
    assert abs(choice_agreement(rng.multinomial(4, np.ones(3) / 3, 5000).astype(float))) < 0.02
    # All prefer the first: they agree, whatever the first is called.
    assert choice_agreement(np.array([[3.0, 0, 0]] * 5)) == 1
    assert math.isnan(krippendorff_alpha(np.array([[3.0, 0]]), np.arange(2.0)))
    assert math.isnan(choice_agreement(np.eye(3)))


def test_alpha_is_the_same_whichever_image_is_called_the_first():
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 5, (60, 3)).astype(float)
    turned = np.where(rng.random(60)[:, None] < 0.5, counts, counts[:, [1, 0, 2]])
    assert choice_agreement(turned) == pytest.approx(choice_agreement(counts), rel=1e-12)


def simulated(
    rng: np.random.Generator,
    b: np.ndarray,
    log_nu: float = -1.0,
    raters: int = 40,
    prompts: int = 25,
    of_rater: float = 0.0,
    of_prompt: float = 0.0,
) -> Judgements:
    """Raters who judge each two models' images for each prompt.

    Args:
        rng: of all chance.
        b: the models' strengths.
        log_nu: how common ties are.
        raters: how many.
        prompts: how many.
        of_rater: standard deviation of a rater's own taste for each model.
        of_prompt: the same of how well each model draws a prompt.
    """
    m = len(b)
    taste = b + of_rater * rng.normal(size=(raters, 1, m)) + of_prompt * rng.normal(size=(1, prompts, m))
    below = chances(taste, log_nu).cumsum(-1)
    said = (rng.random((*below.shape[:-1], 1)) > below[..., :2]).sum(-1)
    i, j = np.triu_indices(m, 1)
    rater, prompt, pair = (place.ravel() for place in np.indices(said.shape))
    return Judgements(m, rater, prompt, i[pair], j[pair], said.ravel())


def test_sides_and_order_and_names_of_raters_change_nothing():
    rng = np.random.default_rng(0)
    one = simulated(rng, np.array([0.4, 0.0, -0.4]), raters=6, prompts=8, of_rater=0.5)
    order = rng.permutation(len(one.rater))
    swap = rng.random(len(order)) < 0.5
    other = np.array([SECOND, FIRST, TIE])[one.outcome]
    turned = Judgements(
        3,
        one.rater[order],
        one.prompt[order],
        np.where(swap, one.second, one.first)[order],
        np.where(swap, one.first, one.second)[order],
        np.where(swap, other, one.outcome)[order],
    )
    np.testing.assert_array_equal(turned.counts(), one.counts())
    a, b = (bootstrap_errors(given, 200, seed=1) for given in (one, turned))
    np.testing.assert_array_equal(a.b, b.b)
    np.testing.assert_array_equal(a.difference, b.difference)
    with pytest.raises(ValueError, match="compared with itself"):
        Judgements(3, one.rater, one.prompt, one.first, one.first, one.outcome)


def test_one_rater_and_one_prompt_have_no_intervals_and_two_have_wide_ones():
    rng = np.random.default_rng(0)
    b = np.array([0.3, -0.3])
    assert bootstrap_errors(simulated(rng, b, raters=1, prompts=1), 100) is None
    assert bootstrap_errors(simulated(rng, b, raters=1, prompts=40), 100).freedom == 39
    few = bootstrap_errors(simulated(rng, b, raters=2, prompts=40), 100)
    assert few.freedom == 1
    assert few.factor == pytest.approx(12.706, abs=1e-3)  # Student's table


def test_answers_that_depend_on_raters_and_prompts_say_less():
    b = np.array([0.3, -0.3])
    alone = bootstrap_errors(simulated(np.random.default_rng(1), b))
    alike = bootstrap_errors(simulated(np.random.default_rng(1), b, of_rater=0.7, of_prompt=0.7))
    assert alone.design[0] < 2
    assert alike.design[0] > 4


STUDIES = [
    pytest.param(0.0, 0.0, 100, id="answers independent"),
    pytest.param(0.5, 0.5, 100, id="raters and prompts differ"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("of_rater", "of_prompt", "repeats"), STUDIES)
def test_known_strengths_lie_in_the_intervals_and_their_order_is_found(of_rater, of_prompt, repeats):
    b, log_nu, raters, prompts = np.array([0.4, 0.0, -0.4]), -1.0, 40, 25
    rng = np.random.default_rng(7)
    # Raters of differing tastes choose less clearly than any one of them: the strengths of all of them are the truth.
    tastes = b + math.hypot(of_rater, of_prompt) * rng.normal(size=(400_000, 3))
    truth = davidson(1000 * chances(tastes, log_nu).mean(0), 3).b
    inside, ordered = np.zeros(3), 0
    for _ in range(repeats):
        study = simulated(rng, b, log_nu, raters, prompts, of_rater, of_prompt)
        found, errors = davidson(study.counts(), 3), bootstrap_errors(study, 400, seed=int(rng.integers(2**31)))
        inside += np.abs(found.b - truth) <= errors.factor * errors.b
        ordered += bool((np.diff(found.b) < 0).all())
    print(f"inside {inside}, in order {ordered} of {repeats}")
    assert (inside >= 0.9 * repeats).all()
    assert ordered >= 0.95 * repeats


@pytest.mark.parametrize(("counts", "bounded"), [
    ([[3, 0, 0]], False),
    ([[6, 0, 1]], False),  # if ties are rare and the one far above the other, all of this is likelier
    ([[6, 1, 0]], True),
    ([[6, 1, 2]], True),
    ([[0, 0, 4]], False),  # ties alone: how much commoner than choices has no bound
    ([[2, 0, 0], [0, 2, 0], [2, 0, 0]], True),  # 0 over 1, 2 over 0, 1 over 2
    ([[2, 0, 0], [2, 0, 0], [2, 0, 0]], False),  # 0 over both
    ([[2, 0, 0], [0, 0, 1], [2, 0, 0]], True),  # 0 over 1, 1 over 2, which ties with 0
    ([[2, 0, 0], [0, 0, 1], [0, 0, 1]], False),
])  # fmt: skip
def test_strengths_have_a_bound_where_every_model_has_lost_to_every_other_by_some_way(counts, bounded):
    models = {1: 2, 3: 3}[len(counts)]
    assert bool(davidson(np.array(counts, float), models).bounded) is bounded
