"""Training loops of the wild whose step is an engine's: right, or refused in a sentence."""

import pytest

import tests.loops.page  # noqa: F401 - knows all loops
from tests.loops import running
from tests.loops.engine import Engine, NotAnEngines
from tests.loops.loop import Loop

# Loops that read or change a gradient where an engine's ascent leaves none, in a hook or by hand; models that are
# trained in part, or by two optimizers.
NOT_AN_ASCENTS = {
    "ACarefulHookIsCalledToo",
    "CompleteGradientsMayBeChanged",
    "GradientsMayBeClamped",
    "GradientsMayBeClampedThroughData",
    "GradientsMayBeClampedWithoutEffect",
    "GradientsMayBeLoggedInThePass",
    "GradientsMayBeMasked",
    "GradientsMayBeMaskedAtTheirNode",
    "GradientsMayBeMaskedMidway",
    "GradientsMayBeReplacedOnTheirLayer",
    "GradientsMayBeScaledNowAndThen",
    "GradientsMayBeWrittenMidway",
    "GradientsMayGetNoise",
    "GradientsOfBiasesMayBeScaled",
    "GroupsMayJoinMidway",
    "LearningRatesAndRadiiMayBeScheduled",
    "OldTokensMayStayAsTheyAre",
    "OneOptimizersBatchMayMissTheOther",
}
LOOPS = [case for case in Loop.known if case.__name__ not in NOT_AN_ASCENTS and not case.slow]


@pytest.mark.slow
@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case.__name__)
def test_an_engines_loop_is_right_or_refused(case, monkeypatch):
    monkeypatch.setattr(running, "Library", Engine)
    monkeypatch.setitem(running.MODES, "engine", {})
    for dtype in case.dtypes:
        outcome = running.outcome(case, "engine", dtype)
        if any(NotAnEngines.__name__ in said for said in outcome.said):
            pytest.skip("the loop calls its optimizer for what is an engine's own business")
        assert outcome.verdict != "WRONG", outcome.said
