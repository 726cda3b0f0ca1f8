"""What a run is, what it says while it trains, and what it came to: plain data, which need no torch."""

from dataclasses import dataclass
from typing import NamedTuple

from nusam.experiments.limits import at_least, not_negative, part_of, shares, some_of

__all__ = ["METRICS", "Epoch", "Outcome", "Recipe", "Report", "Run"]

METRICS = {  # what test and validation accuracies are where a task is judged otherwise, and their titles
    "accuracy": "test accuracy, %",
    "matthews": "Matthews correlation × 100",
    "correlations": "mean of Pearson's and Spearman's correlation × 100",
}


@dataclass(frozen=True)
class Recipe:
    """What all runs of a comparison have in common; numbers that can't be are Refused."""

    epochs: int
    batch_size: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1  # share of the steps
    base: str = "adamw"
    augment: str = "none"
    accumulate: int = 1  # micro-batches of a step, each perturbed on its own
    wrong_labels: float = 0.0  # share of the labels for training and validation that are drawn anew
    beta2: float | None = None  # of Adam and AdamW; None is torch's own
    validates_epochs: bool = False  # whether validation accuracy is known of scored epochs, and not of the last alone
    scored_every: int = 1  # epochs; the last is always scored

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(1, scored_every=self.scored_every)
        not_negative(learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        shares(warm_up=self.warm_up)
        part_of(wrong_labels=self.wrong_labels)


@dataclass(frozen=True)
class Run:
    """What tells one run from another. The base optimizer alone has ρ = 0; numbers that can't be are Refused."""

    model: str
    method: str
    rho: float
    seed: int
    delay: float | None = None  # share of the steps before the perturbation starts; None is the method's own
    power_iterations: int = 1
    stretch: float = 1.0  # of the epochs
    rate: float = 1.0  # of the learning rate
    ascent_share: float = 1.0  # of each batch, that the ascent sees
    one_pass: bool = False  # whether the next step's ascent rides in each step's descent

    def __post_init__(self) -> None:
        not_negative(rho=self.rho, stretch=self.stretch, rate=self.rate)
        at_least(0, seed=self.seed)
        at_least(1, power_iterations=self.power_iterations)
        shares(delay=self.delay)
        some_of(ascent_share=self.ascent_share)


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch; accuracies where it was scored."""

    train_loss: float
    test_accuracy: float | None = None
    validation_accuracy: float | None = None

    def __str__(self) -> str:
        """In a reader's words."""
        scored = "" if self.test_accuracy is None else f", test score {self.test_accuracy:.1%}"
        return f"loss {self.train_loss:.3f}{scored}"


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    run: Run
    epochs: list[Epoch]
    validation_accuracy: float
    delay_steps: int
    perturbation_numel: int
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """That of the last epoch; no epoch is picked. By the task's own metric, where it has one."""
        return self.test_accuracies[max(self.test_accuracies)]

    @property
    def test_accuracies(self) -> dict[int, float]:
        """Of every epoch that was scored, by its number from 1 on."""
        scores = enumerate((epoch.test_accuracy for epoch in self.epochs), 1)
        return {number: score for number, score in scores if score is not None}

    @property
    def accuracy_at_best(self) -> float:
        """That of the scored epoch with the best validation accuracy, the first of equal ones."""
        return self.test_accuracies[
            max(self.test_accuracies, key=lambda number: self.epochs[number - 1].validation_accuracy or 0.0)
        ]


class Report(NamedTuple):
    """What a worker says about its run: an epoch that it finished, or the outcome."""

    worker: int
    run: Run
    news: Epoch | Outcome
