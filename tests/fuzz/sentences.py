"""What the library may say, and when: everything else that is raised or warned of is a fault."""

import linecache
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import nusam

PACKAGE = Path(nusam.__file__).parent

UNREACHED = (
    r"(?P<name>[\w.]+) is (?P<why>also used outside its layer|reached in pieces or by another way|asked for its "
    r"gradient inside the loss|given a hook on its gradient|written in the passes themselves|not reached by its ε in "
    r"the forward), where an ε in the forward can't reach it; exclude it with targets= or use placement='weights'\."
)
ASKS_IDLE = (
    r"The loss asks for the gradient of a parameter of shape \(.*\) inside the ascent, as it did in no step before, so "
    r"that its layer does not form it; take the step again, or use ascent='gradient'\."
)
EVALUATED = (
    r"The model was called in eval mode without gradients inside the descent pass, where its weights are perturbed; "
    r"evaluate it after the pass\."
)
NO_GRADIENT = r"The (ascent|descent) pass ended without any gradient; compute the loss and call loss\.backward\(\) .*"
INSIDE_PASS = r".* was called inside the (ascent|descent) pass, where gradients and weights are not the step's own; .*"
SAVED = r"The model's weights are perturbed inside the descent pass and can't be saved or copied there; .*"
NO_ASCENT = r"descent\(\) was entered without a perturbation; .*"
OTHER_GROUPS = r"The state dict's parameter groups don't match the optimizer's in number or size; .*"
REFUSALS = (UNREACHED, ASKS_IDLE, NO_GRADIENT)

OTHERWISE = (
    r"(?P<names>.+) (was|were) used otherwise than in the steps in which it was compared with its gradient, and was "
    r"not perturbed in this step; its gradient is formed from now on\."
)
DESCENT_ONLY = (
    r"(?P<names>.+) got a gradient in the descent and none (in the ascent|where its ε would have been found, with the "
    r"step before), and was not perturbed in this step; (run the same computation in both passes|it is perturbed from "
    r"the next step on)\."
)
NOT_ADDED = (
    r"(?P<names>.+) got a gradient in the descent, where no layer added its perturbation; exclude it with targets= or "
    r"use placement='weights'\."
)
WRITTEN_LATE = (
    r"The model writes (?P<names>.+) in its own forward, (?:or the loop does .+, )?which was not seen at first, .*"
)
SMALL_REACH = r".* perturbs a .* only, which is .*, less than a tenth; opt\.coverage\(\) names the others.*"
NEVER_PERTURBED = r"The perturbation has not been active in any of .*"
NEVER_TAKEN = r"passes\(\) has cleared the gradients of passes that no step\(\) had taken yet; .*"
NO_PASSES = r"step\(\) has been called twice without passes before it, .*"
WARNINGS = (
    OTHERWISE,
    DESCENT_ONLY,
    NOT_ADDED,
    WRITTEN_LATE,
    SMALL_REACH,
    NEVER_PERTURBED,
    NEVER_TAKEN,
    NO_PASSES,
)


@dataclass(frozen=True)
class Said:
    """A sentence of the library, which pattern it follows, and the parameters that it names."""

    pattern: str
    sentence: str
    names: frozenset[str]
    why: str = ""


def heard(sentence: str, *patterns: str) -> Said | None:
    for pattern in patterns:
        match = re.fullmatch(pattern, sentence)
        if match:
            groups = match.groupdict()
            names = groups.get("names") or groups.get("name") or ""
            return Said(pattern, sentence, frozenset(filter(None, names.split(", "))), groups.get("why") or "")
    return None


def is_ours(error: BaseException) -> bool:
    """Whether a statement of the library raised it on purpose, in one sentence."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    path = Path(frame.f_code.co_filename)
    raised = path.is_relative_to(PACKAGE) and linecache.getline(str(path), line).lstrip().startswith("raise")
    return raised and "\n" not in str(error) and str(error).endswith(".")
