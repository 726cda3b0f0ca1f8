"""Passes that accumulate, live apart or fail"""

import pytest

from tests.loops.loop import ALL, DOUBLE, Loop, to_target


class _Plain(Loop):
    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class GradientsMayAccumulate(_Plain):
    """accumulate=True: three micro-batches, each with a perturbation of its own"""

    def step(self, step):
        for k in range(3):
            at = step + 50 * k
            self.driver.passes(lambda at=at: (self.loss(at) / 3).backward(), accumulate=k > 0)
        self.driver.update()


class AccumulationMayHaveSeveralBackwards(_Plain):
    """accumulate=True, with two backwards in each micro-batch"""

    dtypes = DOUBLE

    def step(self, step):
        def backward(at):
            (self.loss(at) / 3).backward()
            to_target(self.model(self.normal(at + 20, 4, 6)), -1).backward()

        for k in range(2):
            self.driver.passes(lambda at=step + 50 * k: backward(at), accumulate=k > 0)
        self.driver.update()


class AMicroBatchMayGetASecondBackwardMidway(_Plain):
    """accumulate=True: the second micro-batch has two backwards from the fourth step on"""

    dtypes = DOUBLE

    def step(self, step):
        def second():
            self.loss(step + 50).backward()
            if step >= 3:
                to_target(self.model(self.normal(step + 70, 4, 6)), -1).backward()

        self.driver.passes(lambda: self.backward(step))
        self.driver.passes(second, accumulate=True)
        self.driver.update()


class EveryMicroBatchMayAccumulate(_Plain):
    """accumulate=True from the first micro-batch on, each with two backwards"""

    dtypes = DOUBLE

    def step(self, step):
        def backward(at):
            self.loss(at).backward()
            (0.3 * to_target(self.model(self.normal(at + 20, 4, 6)), -1)).backward()

        self.driver.base.zero_grad()
        for at in (step, step + 50):
            self.driver.passes(lambda at=at: backward(at), accumulate=True)
        self.driver.update()


class ClosuresMayRunThePasses(_Plain):
    """opt.step(closure), which zeroes, computes and returns the loss; a second backward from the fourth step on"""

    dtypes = ALL

    def step(self, step):
        def closure():
            self.model.zero_grad()
            loss = self.loss(step)
            loss.backward()
            if step >= 3:
                to_target(self.model(self.normal(step + 50, 4, 6)), -1).backward()
            return loss

        self.driver.closure(closure)


class HalvesMayLiveApart(_Plain):
    """with opt.ascent() and opt.descent(), in functions of their own"""

    dtypes = DOUBLE

    def step(self, step):
        self.driver.halves(lambda: self.backward(step))
        self.driver.update()


class HalvesMayChangeMidway(_Plain):
    """The same, with a second backward in the fourth step, where the ascent is over before it is noticed"""

    halves = True

    def step(self, step):
        self.driver.halves(lambda: self.backward(step))
        self.driver.update()

    def backward(self, step):
        super().backward(step)
        if step == 3:
            to_target(self.model(self.normal(step + 50, 4, 6)), -1).backward()


class _Interrupted(Loop):
    calls = 0

    def step(self, step):
        self.calls = 0
        if step in (2, 4):
            with pytest.raises(FloatingPointError):
                super().step(step)
        super().step(step)

    def backward(self, step):
        self.calls += 1
        loss = to_target(self.model(self.normal(step, 8, 6)))
        if step in (2, 4) and self.calls == self.fails_at:
            raise FloatingPointError("out of range")
        loss.backward()


class AFaultInTheFirstPassLeavesNoTrace(_Interrupted):
    """A forward raises in the ascent, and the batch is tried again"""

    fails_at = 1


class AFaultInTheSecondPassLeavesNoTrace(_Interrupted):
    """A forward raises in the descent, and the batch is tried again"""

    dtypes = ALL
    fails_at = 2


class AFaultInABackwardLeavesNoTrace(Loop):
    """A hook raises in the ascent's backward, two steps later in the descent's, and these batches are left out"""

    dtypes = DOUBLE

    def step(self, step):
        self.calls = 0
        if step not in (2, 4):
            return super().step(step)
        with pytest.raises(FloatingPointError):
            super().step(step)
        return None

    def loss(self, step):
        self.calls += 1
        h = self.model[:2](self.normal(step, 8, 6))
        if (step, self.calls) in ((2, 1), (4, 2)):
            h.register_hook(self.fail)
        return to_target(self.model[2:](h))

    def fail(self, gradient):
        raise FloatingPointError("out of range")
