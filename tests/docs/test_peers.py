"""What the page on other implementations says of the one that can be installed, and of nusam beside it."""

import pytest
import torch
from torch.optim import SGD

import nusam
from tests.conftest import assert_unperturbed, loss_of, mlp, weights

SAM = pytest.importorskip("pytorch_optimizer", reason="the extra bench is not installed").SAM


def theirs():
    model = mlp()
    return model, SAM(model.parameters(), SGD, rho=0.05, lr=0.1)


def ours():
    model = mlp()
    return model, nusam.SAM(SGD(model.parameters(), lr=0.1), rho=0.05, model=model)


def test_an_infinite_gradient_in_the_first_pass():
    model, optimizer = theirs()
    loss_of(model).backward()
    model[0].weight.grad[0, 0] = torch.inf
    optimizer.first_step(zero_grad=True)
    loss_of(model).backward()
    optimizer.second_step(zero_grad=True)
    assert all(parameter.isnan().any() for parameter in model.parameters())

    model, optimizer = ours()
    for name in optimizer.passes():
        loss_of(model).backward()
        if name == "ascent":
            model[0].weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_an_exception_between_the_passes():
    model, optimizer = theirs()
    before = weights(model)

    def fails():
        raise InterruptedError

    loss_of(model).backward()
    with pytest.raises(InterruptedError):
        optimizer.step(fails)
    with pytest.raises(AssertionError):
        assert_unperturbed(model, before)

    model, optimizer = ours()
    before = weights(model)
    with pytest.raises(InterruptedError):
        for name in optimizer.passes():
            if name == "descent":
                raise InterruptedError
            loss_of(model).backward()
    assert_unperturbed(model, before)


def test_a_gradient_in_the_first_pass_and_none_in_the_second():
    for model, optimizer in (theirs(), ours()):
        before = model[3].bias.detach().clone()
        loss_of(model).backward()
        if isinstance(optimizer, SAM):
            optimizer.first_step(zero_grad=True)
            model[0](torch.ones(1, 6)).sum().backward()
            optimizer.second_step()
        else:
            for name in optimizer.passes():
                (loss_of(model) if name == "ascent" else model[0](torch.ones(1, 6)).sum()).backward()
            optimizer.step()
        assert torch.equal(model[3].bias, before)


def test_a_closure_that_the_optimizer_alone_runs():
    """As torch's contract has it; theirs then has no gradient to perturb by in the first step, and says nothing."""

    def stepped(make):
        torch.manual_seed(0)
        model, optimizer = make()

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(closure)
        return weights(model)

    def plain():
        model = mlp()
        return model, SGD(model.parameters(), lr=0.1)

    base = stepped(plain)
    assert all(torch.equal(one, other) for one, other in zip(stepped(theirs), base, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(stepped(ours), base, strict=True))
