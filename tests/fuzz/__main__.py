"""Takes many random steps and records what came of them: ``python -m tests.fuzz [steps [first seed]]``."""

import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import recording
from tests.fuzz import sentences
from tests.fuzz.oracle import DOUBTFUL
from tests.fuzz.running import TRIALS, fuzz
from tests.fuzz.tally import Tally
from tests.fuzz.trial import ROUNDED

DEFAULTS = ("100000", "0")  # steps, first seed
SAID = {
    sentences.UNREACHED: "a matrix is used where an ε in the forward can't reach it",
    sentences.ASKS_IDLE: "the loss asks for a gradient that a served ascent does not form",
    sentences.EVALUATED: "the model is evaluated in the descent",
    sentences.NO_GRADIENT: "a pass ends without a gradient",
    sentences.INSIDE_PASS: "the optimizer is saved, loaded, copied, stepped or extended inside a pass",
    sentences.SAVED: "the model is saved in the descent",
    sentences.OTHERWISE: "a matrix is used otherwise than in the steps that were compared",
    sentences.DESCENT_ONLY: "a gradient in the descent and none in the ascent",
    sentences.NOT_ADDED: "no layer added an ε",
}


def table(seconds: float) -> list[dict[str, Any]]:
    rows = [("steps, each held to the oracle", Tally.steps), ("runs", Tally.trials)]
    rows += [(f"done: {name.replace('_', ' ')}", count) for name, count in sorted(Tally.doings.items())]
    rows += [(f"refused: {SAID[pattern]}", count) for pattern, count in Tally.refusals.most_common()]
    rows += [(f"warned: {SAID[pattern]}", count) for pattern, count in Tally.warned.most_common() if pattern in SAID]
    rows += [
        ("steps whose ε hangs on how sums are rounded", Tally.doubted),
        ("steps after which rounding had added up", Tally.realigned),
        ("wrong", 0),
        ("seconds of a core", round(seconds)),
    ]
    return [{"what": what, "number": number} for what, number in rows]


def main() -> None:
    steps, first = (int(given) for given in (*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]))
    warnings.filterwarnings("ignore", message="The perturbation has not been active")
    torch.set_num_threads(1)
    began = time.process_time()
    seeds = fuzz(steps, first)
    drawn = f"hypothesis {version('hypothesis')} from the seeds {first} to {first + seeds - 1}, {TRIALS} runs of each"
    notes = (
        "Random models, uses of their weights, options and sequences of what a training loop does, drawn by "
        f"{drawn}. After every step weights, buffers, gradients, the base optimizer's state, warm starts, what "
        "metrics() says of ε, generators and what is left on modules are those of a float64 loop by hand, to 1e-9. "
        "Where ε hangs on how sums are rounded (an error of 1e-15 of the largest gradient would move it by "
        f"{DOUBTFUL:g} of itself), and where rounding has added up to {ROUNDED:g}, the loop by hand goes on from the "
        "library's state. A fault ends the run: there was none."
    )
    recording.record("fuzz", "cpu", table(time.process_time() - began), notes)


if __name__ == "__main__":
    main()
