"""A base whose step reads the closure's loss gets the one at the unperturbed weights, or the run says that it can't."""

import warnings

import pytest
import pytorch_optimizer
import schedulefree
import timm.optim
import torch
from torch import nn

import nusam
from tests.bases.problem import closure_of, flat, loss_of, net, sam_step


class Polyak(torch.optim.Optimizer):
    """The step size is the loss over the squared gradient; keeps what it was given."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.seen = []

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.seen.append(loss)
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        scale = 0.5 if loss is None else float(loss) / float(sum((g**2).sum() for g in gradients) + 1e-6)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * scale)
        return loss


class Mandatory(Polyak):
    def step(self, closure):
        return super().step(closure)


class KeywordOnly(Polyak):
    def step(self, *, closure=None):
        return super().step(closure)


class AnyArguments(Polyak):
    def step(self, *args, **options):
        return super().step(*args, **options)


class Nothing(Polyak):
    def step(self):
        return super().step()


BASES = {
    "optional": Polyak,
    "mandatory": Mandatory,
    "keyword": KeywordOnly,
    "any arguments": AnyArguments,
    "none": Nothing,
    "emolynx": lambda p: pytorch_optimizer.load_optimizer("emolynx")(p, lr=1e-2),
    "emofact": lambda p: pytorch_optimizer.load_optimizer("emofact")(p, lr=1e-2),
    "alig": lambda p: pytorch_optimizer.load_optimizer("alig")(p),
    "lookahead": lambda p: pytorch_optimizer.Lookahead(Polyak(p)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


BY_HAND = {"keyword": lambda base: lambda closure: base.step(closure=closure), "none": lambda base: None}


@pytest.mark.parametrize("base", BASES)
def test_it_is_the_loss_of_the_first_pass(base):
    """SAM by copies of the weights, and the base's own step(closure)."""
    ours, hand = net(), net()
    opt, plain = nusam.SAM(BASES[base](ours.parameters()), rho=0.05), BASES[base](hand.parameters())
    for _ in range(6):
        before = loss_of(ours).item()
        assert opt.step(closure_of(ours, opt)).item() == before
        sam_step(hand, plain, 0.05, BY_HAND.get(base, lambda b: b.step)(plain))
        assert (flat(ours) - flat(hand)).abs().max() <= 1e-12
    assert not any(isinstance(loss, torch.Tensor) and loss.requires_grad for loss in getattr(plain, "seen", ()))
    assert not any(isinstance(loss, torch.Tensor) and loss.requires_grad for loss in getattr(opt, "seen", ()))


@pytest.mark.parametrize("base", [name for name in BASES if name not in ("none", "keyword", "alig")])
@pytest.mark.parametrize("off", [{"rho": 0.0}, {"delay": 100}])
def test_without_a_perturbation_it_is_the_base_alone(base, off):
    ours, alone = net(), net()
    opt, plain = nusam.NuSAM(BASES[base](ours.parameters()), **off), BASES[base](alone.parameters())
    for _ in range(6):
        loss = opt.step(closure_of(ours, opt))
        assert loss == plain.step(closure_of(alone, plain))
        assert loss.requires_grad
        assert torch.equal(flat(ours), flat(alone))


@pytest.mark.parametrize("returned", [None, 0.5, {"loss": 0.5}, (0.5, "more")])
def test_what_a_closure_returns_reaches_a_base_that_does_not_mind(returned):
    seen = []

    class Curious(torch.optim.SGD):
        def step(self, closure=None):
            if closure is not None:
                seen.append(closure())
            return super().step()

    model = net()
    opt = nusam.SAM(Curious(model.parameters(), lr=0.1))

    def closure():
        opt.zero_grad()
        loss_of(model).backward()
        return returned

    assert opt.step(closure) is returned
    assert seen == [returned]


def test_a_loop_of_ones_own_gives_no_loss_as_with_the_base_alone():
    ours, hand = net(), net()
    opt, plain = nusam.SAM(Polyak(ours.parameters())), Polyak(hand.parameters())
    for _ in range(3):
        for _ in opt.passes():
            loss_of(ours).backward()
        opt.step()
        sam_step(hand, plain, 0.05)
    assert opt.seen == []
    assert (flat(ours) - flat(hand)).abs().max() <= 1e-12


@pytest.mark.parametrize("options", [{"rho": 0.05}, {"rho": 0.0}, {"delay": 5}])
def test_a_base_that_needs_a_closure_is_refused_in_a_loop_before_anything_is_changed(options):
    model = net()
    opt = nusam.NuSAM(Mandatory(model.parameters()), **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, gradients = flat(model), [p.grad for p in model.parameters()]
    sentence = r"Mandatory can't step without a closure, from which it takes the loss; call opt.step\(closure\)"
    for call in (lambda: next(iter(opt.passes())), opt.step, lambda: opt.step(None)):
        with pytest.raises(RuntimeError, match=sentence):
            call()
    assert torch.equal(flat(model), before)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    opt.step(closure_of(model, opt))
    with pytest.raises(RuntimeError, match=sentence):  # also after a closure that went well
        opt.step()

    def broken():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        opt.step(broken)
    with pytest.raises(RuntimeError, match=sentence):  # or badly
        next(iter(opt.passes()))


def test_a_base_that_needs_a_closure_can_not_step_in_the_backward():
    model = net()
    opt = nusam.NuSAM(Mandatory(model.parameters()), model=model)
    with pytest.raises(RuntimeError, match="Mandatory can't step without a closure"):
        nusam.step_in_backward(opt)


@pytest.mark.parametrize("around", [pytorch_optimizer.Lookahead, timm.optim.Lookahead, pytorch_optimizer.OrthoGrad])
def test_a_base_that_wraps_another_can_not_step_in_the_backward(around):
    model = net()
    opt = nusam.NuSAM(around(torch.optim.SGD(model.parameters(), lr=0.1)), model=model)
    with pytest.raises(TypeError, match="could not hand on to the optimizer that it wraps; wrap that one instead"):
        nusam.step_in_backward(opt)
    opt.step(closure_of(model, opt))


@pytest.mark.parametrize("base", ["emolynx", "adabelief", "schedulefreesgd"])
def test_a_base_with_state_in_its_groups_says_so_when_it_steps_in_the_backward(base):
    model = net()
    opt = nusam.NuSAM(pytorch_optimizer.load_optimizer(base)(model.parameters(), lr=0.01), model=model)
    if hasattr(opt, "train"):
        opt.train()
    nusam.step_in_backward(opt)
    with pytest.raises(TypeError, match="keeps state in its param groups, which steps of one parameter at a time"):
        opt.step(closure_of(model, opt))


class Extrapolates(torch.optim.Optimizer):
    """Asks for the gradient at other weights than the step began at."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.1)
        return loss


class AsksTwice(Extrapolates):
    @torch.no_grad()
    def step(self, closure=None):
        closure()
        return super().step(closure)


@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("base", [Extrapolates, AsksTwice])
def test_a_base_that_asks_for_the_loss_elsewhere_is_refused_and_the_weights_are_as_they_were(base, rho):
    model = net()
    opt = nusam.SAM(base(model.parameters()), rho=rho)
    before = flat(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{base.__name__} evaluates its closure at other weights than the step"):
            opt.step(closure_of(model, opt))
        assert torch.equal(flat(model), before)


def test_a_base_that_asks_twice_where_it_is_gets_the_same_answer():
    class Careful(torch.optim.SGD):
        def step(self, closure=None):
            assert closure() == closure()
            return super().step(closure)

    model = net()
    opt = nusam.SAM(Careful(model.parameters(), lr=0.1))
    for _ in range(3):
        assert opt.step(closure_of(model, opt)).requires_grad


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: schedulefree.SGDScheduleFreeClosure(p), "SGDScheduleFreeClosure moves the weights before it calls"),
        (lambda p: schedulefree.AdamWScheduleFreeClosure(p), "AdamWScheduleFreeClosure moves the weights before it"),
        (lambda p: pytorch_optimizer.BSAM(p, num_data=16), "BSAM has a hyperparameter rho of its own"),
        (lambda p: pytorch_optimizer.Lookahead(schedulefree.SGDScheduleFreeClosure(p)), "Lookahead moves the weights"),
    ],
)
def test_those_known_to_move_first_are_refused_at_construction(make, sentence):
    with pytest.raises(TypeError, match=sentence):
        nusam.SAM(make(net().parameters()))


@pytest.mark.parametrize("argument", ["loss", "hessian_estimate", "grads"])
def test_a_step_with_another_mandatory_argument_is_refused_at_construction(argument):
    scope: dict = {}
    exec(f"def step(self, {argument}, closure=None): ...", scope)
    kind = type("Odd", (torch.optim.SGD,), {"step": scope["step"]})
    with pytest.raises(TypeError, match=rf"Odd (has a step\(\) that needs '{argument}'|differentiates its gradients)"):
        nusam.SAM(kind(nn.Linear(2, 2).parameters(), lr=0.1))


class Bare(torch.optim.SGD):
    """A wrapper that keeps the defaults of what it wraps to itself."""

    def __init__(self, inner):
        self.inner, self.defaults = inner, {}
        self.param_groups, self.state = inner.param_groups, inner.state


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m: pytorch_optimizer.LOMO(m), "LOMO moves the weights inside its backward, which the ascent would"),
        (lambda m: pytorch_optimizer.AdaLOMO(m), "AdaLOMO moves the weights inside its backward, which the ascent"),
        (
            lambda m: pytorch_optimizer.SafeFP16Optimizer(torch.optim.SGD(m.parameters(), lr=0.1)),
            "SafeFP16Optimizer has no defaults, which every torch.optim.Optimizer has; wrap the optimizer inside it",
        ),
        (lambda m: Bare(torch.optim.Adadelta(m.parameters())), "Bare has a hyperparameter rho of its own"),
        (lambda m: Bare(torch.optim.LBFGS(m.parameters())), "LBFGS evaluates its closure several times a step"),
        (lambda m: Bare(nusam.SAM(torch.optim.SGD(m.parameters(), lr=0.1))), "base_optimizer is a SAM, itself a wrap"),
    ],
)
def test_what_no_pair_of_passes_can_serve_is_refused_at_construction(make, sentence):
    with pytest.raises(TypeError, match=sentence) as error:
        nusam.NuSAM(make(net()))
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("base", ["optional", "mandatory", "emolynx", "sgd"])
@pytest.mark.parametrize("callback", [True, False])
def test_lightnings_loop_hands_it_over(base, callback, tmp_path):
    """SAM by hand on the same batches, with the base's own step(closure)."""
    import pytorch_lightning as pl

    from nusam.integrations.lightning import SharpnessAwareCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            return loss_of(self.net)

        def configure_optimizers(self):
            return nusam.SAM(BASES[base](self.net.parameters()), rho=0.05)

    module, hand = Module(), net()
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[SharpnessAwareCallback()] if callback else [],
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about workers
        trainer.fit(module, torch.utils.data.DataLoader(range(4), batch_size=1))
    plain = BASES[base](hand.parameters())
    for _ in range(4):
        sam_step(hand, plain, 0.05, plain.step)
    assert (flat(module.net) - flat(hand)).abs().max() <= 1e-12
