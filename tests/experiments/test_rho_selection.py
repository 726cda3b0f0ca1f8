"""ρ is chosen by validation accuracy alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nusam.experiments.runs.rho_selection import Contest, Plan
from nusam.experiments.training.data import load
from nusam.experiments.training.loop import train
from nusam.experiments.training.spec import Epoch, Outcome, Recipe, Run

CPU = torch.device("cpu")
MIXER = Contest("mixer", "nusam")


def outcome(run: Run, validation: float, test: float) -> Outcome:
    return Outcome(run, [Epoch(1.0, test)], validation, delay_steps=0, perturbation_numel=1, seconds=1.0)


def finish(plan: Plan, validation, test=lambda rho: 0.5) -> Plan:
    """Finish every run with accuracies that depend on ρ."""
    while plan.pending:
        run = plan.pending.popleft()
        plan.add(outcome(run, validation(run.rho), test(run.rho)))
    return plan


def test_validation_decides_where_the_test_split_disagrees():
    plan = Plan({MIXER: (0.1, 0.2, 0.3)}, seeds=3, trial_seeds=2)
    finish(plan, validation={0.1: 0.6, 0.2: 0.9, 0.3: 0.7}.get, test={0.1: 0.99, 0.2: 0.1, 0.3: 0.99}.get)
    assert plan.chosen == {MIXER: 0.2}
    assert plan.trials(MIXER) == {0.1: [0.6, 0.6], 0.2: [0.9, 0.9], 0.3: [0.7, 0.7]}


def test_the_smallest_of_equal_radii_wins():
    plan = finish(Plan({MIXER: (0.3, 0.1, 0.2)}, seeds=1, trial_seeds=2), validation=lambda rho: 0.5)
    assert plan.chosen == {MIXER: 0.1}


def test_only_the_chosen_radius_gets_the_other_seeds():
    plan = Plan({MIXER: (0.1, 0.2), Contest("mixer", "adamw"): (0.0,)}, seeds=5, trial_seeds=2)
    planned = plan.runs()
    finish(plan, validation=lambda rho: rho)
    assert len(plan.outcomes) == planned == 2 * 2 + 3 + 5
    assert [o.run.seed for o in plan.chosen_outcomes(MIXER)] == [0, 1, 2, 3, 4]
    assert [o.run.seed for o in plan.outcomes if o.run.method == "nusam" and o.run.rho == 0.1] == [0, 1]


def test_nothing_is_chosen_before_every_trial_is_finished():
    plan = Plan({MIXER: (0.1, 0.2)}, seeds=2, trial_seeds=2)
    runs = list(plan.pending)
    settled = [plan.add(outcome(run, 0.5, 0.5)) for run in runs]
    assert settled == [False, False, False, True]
    assert Plan({MIXER: (0.1, 0.2)}, seeds=2, trial_seeds=2).chosen_outcomes(MIXER) == []


def test_no_run_is_planned_twice():
    plan = finish(Plan({MIXER: (0.1, 0.2, 0.3)}, seeds=4, trial_seeds=2), validation=lambda rho: -rho)
    runs = [o.run for o in plan.outcomes]
    assert len(set(runs)) == len(runs) == plan.runs()


@pytest.mark.slow
def test_poisoned_test_labels_change_neither_choice_nor_weights(tmp_path):
    source = load("digits", tmp_path)
    rng = np.random.default_rng(0)
    poisoned = replace(source, test_labels=rng.permutation(source.test_labels), test=rng.permutation(source.test))
    plans = []
    for data in (source, poisoned):
        plan = Plan({MIXER: (0.05, 2.0)}, seeds=2, trial_seeds=1)
        while plan.pending:
            plan.add(train(plan.pending.popleft(), Recipe(epochs=8), data, CPU, lambda epoch: None))
        plans.append(plan)
    clean, fooled = plans
    assert clean.chosen == fooled.chosen == {MIXER: 0.05}
    assert clean.trials(MIXER) == fooled.trials(MIXER)
    losses = [[[e.train_loss for e in o.epochs] for o in plan.outcomes] for plan in plans]
    assert losses[0] == losses[1]
    assert clean.outcomes[0].test_accuracy > 0.5 > fooled.outcomes[0].test_accuracy == pytest.approx(0.1, abs=0.1)


def test_a_share_is_every_methods_but_that_of_the_base_optimizer_alone():
    plan = Plan({Contest("mixer", "adamw"): (0.0,), MIXER: (0.1, 0.2)}, seeds=3, trial_seeds=2, ascent_share=1 / 8)
    runs = list(plan.pending)
    assert {run.ascent_share for run in runs if run.method == "adamw"} == {1.0}
    assert {run.ascent_share for run in runs if run.method == "nusam"} == {1 / 8}
    finish(plan, validation=lambda rho: rho)
    assert {o.run.ascent_share for o in plan.chosen_outcomes(MIXER)} == {1 / 8}
