"""ρ is chosen by validation accuracy alone, and differences are those of scipy's paired test."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from nusam.experiments.recipes.study import Hypothesis, judged
from nusam.experiments.runs.contest import Contender, Contest, Setting, holm, mean_and_half_width
from nusam.experiments.runs.search import Search, carried_out
from nusam.experiments.runs.store import Store
from nusam.experiments.training.spec import Epoch, Outcome, Recipe

SETTING = Setting("digits", "mixer", Recipe(2), seeds=4, radii={"nusam": (0.1, 0.2, 0.3)})
CONTENDERS = (
    Contender("AdamW", "adamw"),
    Contender("νSAM", "nusam"),
    Contender("T=5", "nusam", {"power_iterations": 5}, radius_of="νSAM"),
)


@pytest.fixture
def store(tmp_path):
    """Test accuracies are random; validation prefers the second radius."""
    store = Store(tmp_path)
    noise = np.random.default_rng(0)
    contest = Contest(SETTING, CONTENDERS)

    def add(cells):
        for cell in cells:
            if cell not in store:
                validation = 0.9 - abs(cell.run.rho - 0.2)
                epochs = [Epoch(1.0, float(noise.random())) for _ in range(2)]
                store.add(cell, Outcome(cell.run, epochs, validation, 0, 1, 0.1), torch.device("cpu"))

    carried_out(contest.searches(), store, add)
    add(contest.finals(store))
    return store


def test_the_radius_is_the_one_that_validates_best(store, tmp_path):
    contest = Contest(SETTING, CONTENDERS)
    assert contest.radius(store, "νSAM") == 0.2
    assert contest.radius(store, "T=5") == 0.2
    assert contest.radius(store, "AdamW") == 0.0
    (tried,) = (search.wanted(Store(tmp_path / "empty")) for search in contest.searches()[1:])
    assert {cell.run.rho for cell in tried} == {0.1, 0.2, 0.3}
    assert {cell.run.seed for cell in tried} == {100, 101}
    assert {cell.run.seed for cell in contest.finals(store)} == {0, 1, 2, 3}


def test_a_paired_difference_is_scipys(store):
    contest = Contest(SETTING, CONTENDERS)
    a, b = ([100 * o.test_accuracy for o in contest.outcomes(store, label)] for label in ("νSAM", "AdamW"))
    mean, half = contest.difference(store, "νSAM", "AdamW")
    test = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert mean - half == pytest.approx(test.low)
    assert mean + half == pytest.approx(test.high)


def test_best_and_last_iterates_are_told_apart(store):
    contest = Contest(SETTING, CONTENDERS)
    row = contest.rows(store, ("AdamW",))[1]
    outcomes = contest.outcomes(store, "νSAM")
    last = np.mean([100 * o.epochs[-1].test_accuracy for o in outcomes])
    best = np.mean([100 * max(e.test_accuracy for e in o.epochs) for o in outcomes])
    assert row["last iterate"].startswith(f"{last:.2f} ±")
    assert row["best iterate"].startswith(f"{best:.2f} ±")


def validated(store, accuracy):
    """What adds runs with such a validation accuracy, by their ρ."""

    def add(cells):
        for cell in cells:
            store.add(cell, Outcome(cell.run, [Epoch(1.0, 0.5)], accuracy(cell.run.rho), 0, 1, 0.1), "cpu")

    return add


@pytest.mark.parametrize(("best", "bracketed"), [(0.1, False), (0.2, True), (0.3, False)])
def test_a_radius_at_an_end_of_its_candidates_is_not_bracketed(tmp_path, best, bracketed):
    store, contest = Store(tmp_path), Contest(SETTING, CONTENDERS)
    with pytest.raises(LookupError, match="the search for the radius of νSAM is not at its end"):
        contest.radius(store, "νSAM")
    carried_out(contest.searches(), store, validated(store, lambda rho: -abs(rho - best)))
    assert contest.bracketed(store, "νSAM") == contest.bracketed(store, "T=5") == bracketed
    assert contest.bracketed(store, "AdamW")  # has none to choose


@pytest.mark.parametrize(("best", "bracketed"), [(0.02, True), (0.1, True), (3.2, True), (0.0, False)])
def test_a_radius_that_is_not_given_is_searched_for_until_it_is_bracketed(tmp_path, best, bracketed):
    store, contest = Store(tmp_path), Contest(replace(SETTING, radii={}), CONTENDERS)
    carried_out(
        contest.searches(), store, validated(store, lambda rho: -abs(math.log(max(rho, 1e-9) / (best or 1e-9))))
    )
    assert contest.bracketed(store, "νSAM") == bracketed
    if bracketed:
        assert 1 / math.sqrt(2) <= contest.radius(store, "νSAM") / best <= math.sqrt(2)


def test_a_single_radius_is_given_and_not_chosen(tmp_path):
    contest = Contest(replace(SETTING, radii={"nusam": (0.1,)}), CONTENDERS)
    assert contest.bracketed(Store(tmp_path), "νSAM")


def by_hand(differences, level=0.05):
    """Which of them Holm's procedure rejects, as its paper has it."""
    p = [stats.ttest_1samp(values, 0).pvalue for values in differences]
    rejected = set()
    for step, index in enumerate(np.argsort(p)):
        if p[index] > level / (len(p) - step):
            break
        rejected.add(int(index))
    return rejected


@pytest.mark.parametrize("seed", range(20))
def test_intervals_by_holm_leave_out_zero_where_holm_rejects_it(seed):
    noise = np.random.default_rng(seed)
    effects = noise.choice([0.0, 0.5, 1.0, 3.0], size=noise.integers(1, 12))
    differences = [list(noise.normal(effect, 1.0, size=6)) for effect in effects]
    halves = holm(differences)
    assert {i for i, half in enumerate(halves) if abs(np.mean(differences[i])) > half} == by_hand(differences)
    for values, half in zip(differences, halves, strict=True):
        assert half >= mean_and_half_width(values)[1] - 1e-12


def test_holm_of_one_difference_is_the_plain_interval():
    values = [0.5, 1.0, 0.25, 2.0]
    assert holm([values]) == pytest.approx([mean_and_half_width(values)[1]])


def test_holm_takes_single_seeds_and_differences_without_scatter():
    single, level, nothing = holm([[3.0], [1.0, 1.0, 1.0], [0.0, 0.0]])
    assert (single, level, nothing) == (float("inf"), 0.0, 0.0)


def test_a_single_value_has_no_interval():
    assert mean_and_half_width([3.0]) == (3.0, float("inf"))


# ------------------------------------------------------------------------------- the study


@pytest.mark.parametrize(
    ("least", "most", "alternatives"),
    [(0.0, math.inf, ["greater"]), (-0.3, math.inf, ["greater"]), (-0.5, 0.5, ["greater", "less"])],
)
def test_the_p_values_of_the_study_are_those_of_t_tests(least, most, alternatives):
    values = [0.4, -0.1, 0.3, 0.9, 0.2, 0.1]
    margins = {"greater": least, "less": most}
    expected = max(stats.ttest_1samp(values, margins[side], alternative=side).pvalue for side in alternatives)
    assert Hypothesis("", "", "", "", least, most).p_value(values) == pytest.approx(expected)


def test_holms_procedure_stops_at_the_first_claim_that_fails():
    assert judged([0.001, 0.04, 0.012, 0.2]) == [True, False, True, False]
    assert judged([0.03, 0.02]) == [True, True]
    assert judged([0.03, 0.026]) == [False, False]


class _Store(dict):
    """Validation accuracies by value."""

    def __getitem__(self, value):
        return SimpleNamespace(validation_accuracy=super().__getitem__(value))


@pytest.mark.parametrize("start", [0.1, 0.4, 3.2])
def test_a_search_ends_where_both_neighbours_are_worse(start):
    def curve(value):
        return -abs(math.log2(value / 0.8))

    store = _Store()
    search = Search(start, lambda value: [value])
    carried_out([search], store, lambda values: store.update({value: curve(value) for value in values}))
    assert search.found == pytest.approx(0.8)
    assert {0.4, 0.8, 1.6} <= {round(value, 6) for value in store}


def test_a_search_takes_the_smallest_of_equal_values_and_stops_at_its_least():
    store = _Store()
    search = Search(0.8, lambda value: [value], least=0.2)
    carried_out([search], store, lambda values: store.update(dict.fromkeys(values, 0.5)))
    assert search.found == 0.2
    assert min(store) == 0.2
