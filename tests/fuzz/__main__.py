"""``python -m tests.fuzz [STEPS [SEED]]`` takes random steps, and records under benchmarks/results what was said."""

import sys
import time
import warnings
from pathlib import Path

import torch

from tests.fuzz.running import fuzz
from tests.fuzz.trial import Tally

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from recording import record


def main() -> None:
    steps, first = int([*sys.argv[1:], "100000"][0]), int([*sys.argv[2:], "10000"][0])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The perturbation has not been active")
    began = time.process_time()
    seeds = fuzz(steps, first, shrinks=False)
    seconds = time.process_time() - began
    rows = [
        {"what": "steps equal to the loop by hand", "count": Tally.steps},
        {"what": "random runs", "count": Tally.trials},
        {"what": "seeds, from the first on", "count": f"{seeds}, {first}"},
        {"what": "steps that rounding decides, taken over from the library", "count": Tally.doubted},
        {
            "what": "milliseconds a step, with the loop by hand",
            "count": round(1000 * seconds / Tally.steps, 1),
        },
        *({"what": f"refused: `{what}`", "count": count} for what, count in sorted(Tally.refusals.items())),
        *({"what": f"warned: `{what}`", "count": count} for what, count in sorted(Tally.warned.items())),
    ]
    record("fuzz", "cpu", rows, "Random module trees, uses of their weights and training loops, by tests/fuzz.")


if __name__ == "__main__":
    main()
