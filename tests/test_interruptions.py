"""Whatever leaves a pass early, and wherever, the weights are the unperturbed ones afterwards."""

import copy
from collections import Counter
from contextlib import closing, nullcontext

import pytest
import torch

import nusam
from tests.conftest import assert_unperturbed, batch, loss_of, mlp, train_step, weights
from tests.interrupting import bytecodes, interrupted, moments

METHODS = [nusam.NuSAM, nusam.NuSAMNorm, nusam.SAM, nusam.SAMON, nusam.GaussSAM]


def optimizer(kind, model, lr=0.1, **options):
    return kind(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), rho=0.05, model=model, **options)


def nested_autocasts():
    """How many are open; while any is, none forgets its half-precision copies of the weights."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def forget_autocasts():
    """Close what an interrupt left open, so that no later test uses old copies."""
    for _ in range(nested_autocasts()):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "accumulate", "options", "phase"),
    [
        (nusam.NuSAM, False, {"ascent": "gradient"}, 0),
        (nusam.NuSAM, True, {"ascent": "matrix-free"}, 4),
        (nusam.NuSAM, False, {"placement": "forward"}, 8),
        (nusam.SAM, False, {}, 12),
    ],
)
def test_an_interrupt_anywhere_in_both_passes(kind, accumulate, options, phase):
    model = mlp()
    opt = optimizer(kind, model, **options)
    for _ in range(3):
        train_step(model, opt)
    before = weights(model)
    verification = opt._ascent.verification
    steps = verification._age

    def passes():
        for _ in opt.passes(accumulate=accumulate):
            loss_of(model).backward()

    def begin(compares):
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.data.copy_(old)  # so that each interrupt is judged on its own
            parameter.grad = torch.full_like(old, 7.0)
        verification._age, verification._asked = steps, compares  # and in the same kind of step

    def counted(compares):
        begin(compares)
        return Counter(bytecodes(passes))

    counted(False)  # from here on the steps are alike
    served, compared = counted(False), counted(True)
    assert sum(served.values()) > 1000  # the trace does see the package
    only_compared = Counter({bytecode: compared[bytecode] for bytecode in compared if bytecode not in served})
    for compares, executed in ((False, served), (True, only_compared)):
        for bytecode, round_ in moments(executed, phase):
            begin(compares)
            assert interrupted(passes, bytecode, round_)
            assert_nothing_is_left(model, before, options)
    train_step(model, opt)  # and the optimizer is usable
    assert opt.active
    copy.deepcopy(model).load_state_dict(model.state_dict())  # and no guard is left behind
    with torch.no_grad():
        model(batch()[0])


def assert_nothing_is_left(model, before, options):
    # a backward that torch.compile must see through has a plain ``with``, and an interrupt at its end skips that
    assert nested_autocasts() == 0 or options.get("ascent") == "matrix-free"
    forget_autocasts()
    assert torch.is_grad_enabled()
    assert torch._C._is_torch_function_enabled()
    assert_unperturbed(model, before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("where", ["ascent", "descent"])
@pytest.mark.parametrize("moment", ["before backward", "after backward"])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("style", ["loop", "closure", "halves"])
def test_an_exception_in_the_body(kind, where, moment, exception, style):
    model = mlp()
    opt = optimizer(kind, model)
    train_step(model, opt)
    before = weights(model)
    names = iter(["ascent", "descent"])

    def body():
        fails = next(names) == where
        opt.zero_grad()
        loss = loss_of(model)
        if fails and moment == "before backward":
            raise exception
        loss.backward()
        if fails:
            raise exception
        return loss

    def halves():
        with opt.ascent():
            body()
        with opt.descent():
            body()

    def loop():
        for _ in opt.passes():
            body()

    with pytest.raises(exception):
        {"loop": loop, "closure": lambda: opt.step(body), "halves": halves}[style]()
    assert_unperturbed(model, before)
    train_step(model, opt)


def numbered(opt, body):
    for _ in enumerate(opt.passes()):
        body()


def behind_a_generator(opt, body):
    def passes():
        yield from opt.passes(*batch())

    for _ in passes():
        body()


def in_a_closure(opt, body):
    opt.step(body)


def closed(opt, body):
    with closing(opt.passes()) as passes:
        for _ in passes:
            body()


def closed_by_hand(opt, body):
    passes = opt.passes()
    try:
        for _ in passes:
            body()
    finally:
        passes.close()
        passes.close()


def without_an_optimizer(opt, body):
    for _ in nusam.Perturbation(opt.model).passes():
        body()


@pytest.mark.parametrize("fatal", [0, 1], ids=["ascent", "descent"])
@pytest.mark.parametrize(
    "loop",
    [numbered, behind_a_generator, in_a_closure, closed, closed_by_hand, without_an_optimizer],
)
def test_an_exception_that_is_kept_keeps_no_pass(loop, fatal):
    """As a notebook keeps it, with all its frames and their variables."""
    model = mlp()
    opt = optimizer(nusam.NuSAM, model, placement="weights")
    train_step(model, opt)
    before = weights(model)
    calls = iter(range(2))

    def body():
        loss = loss_of(model)
        loss.backward()
        if next(calls) == fatal:
            raise OverflowError
        return loss

    with pytest.raises(OverflowError) as kept:
        loop(opt, body)
    assert kept.traceback
    assert opt._pass is None
    assert_unperturbed(model, before)
    train_step(model, opt)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_break(kind, where):
    model = mlp()
    opt = optimizer(kind, model)
    before = weights(model)
    for name in opt.passes():
        loss_of(model).backward()
        if name == where:
            break
    assert_unperturbed(model, before)
    if where == "ascent":  # its gradient is not the step's
        assert all(p.grad is None for p in model.parameters())
        state = opt.state_dict()
        opt.step()
        assert_unperturbed(model, before, rho=0)
        assert opt.state_dict()["state"].keys() == state["state"].keys()
    train_step(model, opt)


@pytest.mark.parametrize("kind", [nusam.GSAM, nusam.WSAM, nusam.LookSAM])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_break_at_the_end_of_the_descent_is_the_end(kind, accumulate):
    models, opts = [mlp()], []
    models.append(copy.deepcopy(models[0]))
    for model in models:
        opts.append(optimizer(kind, model))
        for step in range(3):
            for name in opts[-1].passes(accumulate=accumulate):
                loss_of(model, step).backward()
                if name == "descent" and model is models[0]:
                    break
            if not accumulate or step != 1:
                opts[-1].step()
                opts[-1].zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_step_with_one_of_two_gradients_is_refused(cleared, accumulate):
    model = mlp()
    opt = optimizer(nusam.GSAM, model)

    def fails():
        with opt.ascent(accumulate):
            loss_of(model).backward()
        with opt.descent(accumulate):
            loss_of(model).backward()
            raise ValueError("after the backward")

    with pytest.raises(ValueError, match="after the backward"):
        fails()
    if cleared:
        opt.zero_grad()
        for _ in opt.passes(accumulate=accumulate):
            loss_of(model).backward()
        opt.step()
        return
    before = weights(model)
    with pytest.raises(RuntimeError, match="before its end, where both gradients are mixed"):
        opt.step()
    assert_unperturbed(model, before, rho=0)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_weight_written_in_a_descent_that_is_left_is_refused(leaves):
    model = mlp()
    opt = optimizer(nusam.NuSAM, model, placement="forward")
    train_step(model, opt)

    def run():
        for name in opt.passes():
            if name == "descent":
                model[0].weight.data = model[0].weight.data * 2
            loss_of(model).backward()
            if name == "descent" and leaves:
                break
        opt.step()

    before = weights(model)
    with pytest.raises(RuntimeError, match="written in the passes themselves"):
        run()
    assert_unperturbed(model, before, rho=0)


def test_a_break_in_an_accumulating_ascent_keeps_what_was_accumulated():
    model = mlp()
    opt = optimizer(nusam.NuSAM, model)
    for _ in opt.passes(accumulate=True):
        loss_of(model, 0).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for _ in opt.passes(accumulate=True):
        loss_of(model, 1).backward()
        break
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)


def test_an_iterator_that_is_dropped_half_way():
    model = mlp()
    opt = optimizer(nusam.NuSAM, model)
    before = weights(model)
    iterator = opt.passes()
    next(iterator)
    loss_of(model).backward()
    next(iterator)
    assert not torch.equal(model[0].weight, before[0])
    del iterator
    assert_unperturbed(model, before)


def test_the_weights_that_are_restored_are_exact():
    """W + ε − ε is within 1 ulp for a rank-one ε, and bit-equal for a dense one."""
    for kind in METHODS:
        model = mlp()
        opt = optimizer(kind, model, lr=0.0)
        before = weights(model)
        for _ in opt.passes():
            loss_of(model).backward()
        assert_unperturbed(model, before)
        if kind not in (nusam.NuSAM, nusam.NuSAMNorm):
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", METHODS)
def test_nothing_stays_perturbed_at_lr_zero(kind):
    model = mlp()
    opt = optimizer(kind, model, lr=0.0)
    before = weights(model)
    for step in range(100):
        train_step(model, opt, step)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert (parameter - old).abs().max() <= 100 * torch.finfo(torch.float32).eps * (old.abs().max() + 0.05)


def test_a_parameter_with_a_gradient_in_one_pass_only():
    """davda54/sam leaves a parameter perturbed that had a gradient in pass 1 and none in pass 2."""
    for kind in (nusam.NuSAM, nusam.SAM):
        for missing in ("ascent", "descent"):
            model = mlp()
            opt = kind(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.05)
            before = weights(model)
            unseen = pytest.warns(UserWarning, match=r"0\.0 got a gradient in the descent and none in the ascent")
            with unseen if missing == "ascent" else nullcontext():
                for name in opt.passes():
                    loss_of(model).backward()
                    if name == missing:
                        model[0].weight.grad = None
            opt.step()
            assert_unperturbed(model, before)
            if missing == "ascent":
                assert "epsilon/0.0" not in opt.metrics()
