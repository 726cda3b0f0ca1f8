"""ε in the forward: exact in any precision, never a write; and where ε in the weights goes wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nusam
from nusam.layers.kinds import Conv1D, Embedding, Linear
from nusam.placement.in_forward import InForward
from nusam.reference import svd_top1
from tests.conftest import loss_of, mlp, train_step, weights
from tests.test_matrix_free import KINDS, cross_entropy, square_loss


def descent(model, loss, placement, ascent="gradient"):
    """The descent pass's loss and gradients, and the weights that it saw."""
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3, model=model, placement=placement, ascent=ascent
    )
    torch.manual_seed(5)
    for name in opt.passes():
        value = loss(model)
        value.backward()
        if name == "descent":
            seen = weights(model)
    return value.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, seen


def assert_same_descent(model, loss):
    before = weights(model)
    in_weights = descent(copy.deepcopy(model), loss, "weights")
    forward = descent(model, loss, "forward")
    assert forward[0] == pytest.approx(in_weights[0], abs=1e-12)
    assert forward[1].keys() == in_weights[1].keys()
    scale = max(gradient.abs().max() for gradient in in_weights[1].values())
    for name, gradient in forward[1].items():
        assert (gradient - in_weights[1][name]).abs().max() <= 1e-12 * max(scale, 1.0), name
    assert all(torch.equal(a, b) for a, b in zip(forward[2], before, strict=True))  # while perturbed
    assert not all(torch.equal(a, b) for a, b in zip(in_weights[2], before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding-frequency"])
def test_every_kind_of_layer_computes_as_with_perturbed_weights(kind):
    model = KINDS[kind][0]().double()
    for p in model.parameters():
        p.data += 0.1  # no exact zeros
    assert_same_descent(model, square_loss())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.BertModel(config, add_pooling_layer=False)
    assert_same_descent(model.double(), cross_entropy(3, 12, vocabulary=31))


def test_timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5
    )  # fmt: skip
    assert_same_descent(model.double(), cross_entropy(2, 3, 16, 16))


@pytest.mark.parametrize("kind", [Linear, Conv1D, Embedding])
def test_the_forward_of_one_layer_against_a_perturbed_matrix(kind):
    n, m = 5, 4
    W, u, v = torch.randn(n, m).double(), torch.randn(n).double(), torch.randn(m).double()
    x = torch.randint(0, n, (2, 3)) if kind is Embedding else torch.randn(2, 3, n if kind is Conv1D else m).double()
    handler = InForward(u, v)
    torch.testing.assert_close(handler(kind, x, W, None), kind.apply(x, W + torch.outer(u, v), None))


@pytest.mark.parametrize(("n", "m", "least"), [(768, 768, 0.30), (1024, 4096, 0.50)])
def test_the_trap_of_bfloat16_weights(n, m, least):
    """ρuvᵀ added to bfloat16 weights is mostly rounded away; in the forward it is there to bfloat16 accuracy."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(m, n, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(0.02 * torch.randn(n, m, generator=generator))
    u = nn.functional.normalize(torch.randn(n, generator=generator), dim=0)
    v = nn.functional.normalize(torch.randn(m, generator=generator), dim=0)
    epsilon = 0.05 * torch.outer(u, v)

    written = (layer.weight + epsilon.bfloat16()).float() - layer.weight.float()
    assert torch.linalg.vector_norm(written - epsilon) >= least * torch.linalg.vector_norm(epsilon)
    assert (written == 0).float().mean() > 0.5

    x = torch.randn(8, m, generator=generator).bfloat16()
    exact = x.double() @ (layer.weight.double() + epsilon.double()).mT
    unperturbed = x.double() @ layer.weight.double().mT
    handler = InForward(u, 0.05 * v)
    y = handler(Linear, x, layer.weight, None).double()
    assert ((y - exact).abs() <= 2**-7 * exact.abs() + 2**-8).all()
    # and what it adds is ε's effect, not rounding noise
    added = handler(Linear, x.float(), layer.weight.float(), None).double() - unperturbed
    torch.testing.assert_close(added, exact - unperturbed, rtol=0, atol=1e-4)


def test_bfloat16_weights_are_never_written_and_train():
    model = mlp(torch.bfloat16)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)  # auto
    before = weights(model)
    losses = {}
    for name in opt.passes():
        loss = loss_of(model)
        loss.backward()
        losses[name] = loss.item()
        assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert losses["descent"] > losses["ascent"]
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.01, model=model)
    for _ in range(60):
        train_step(model, opt)
    assert loss_of(model).item() < 0.7 * losses["ascent"]


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.NuSAMNorm])
def test_a_thousand_steps_at_lr_zero_are_bit_equal(kind):
    model = mlp()
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.0), model=model, placement="forward")
    before = weights(model)
    for step in range(1000):
        train_step(model, opt, step)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


def test_autocast():
    model = mlp()
    results = []
    for placement in ("weights", "forward"):
        clone = copy.deepcopy(model)

        def loss(model):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(model)

        results.append(descent(clone, loss, placement))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    for name, gradient in results[0][1].items():
        assert (
            torch.linalg.vector_norm(gradient - results[1][1][name]) <= 0.1 * torch.linalg.vector_norm(gradient) + 1e-3
        )


class LinearOfPython(torch.autograd.Function):
    """F.linear as ZeRO 3 puts it in the place of torch's: its backward asks the parameter for its entries anew."""

    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.save_for_backward(x, W, bias)
        return x @ W.t() + bias

    @staticmethod
    def backward(ctx, D):
        x, W, _ = ctx.saved_tensors
        rows = D.reshape(-1, D.shape[-1])
        return D @ W, rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0)


def linear_of_python(x, W, bias=None):
    return LinearOfPython.apply(x, W, bias)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(200, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(200, 200)

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


LAYERS = {"linear": lambda: nn.Linear(200, 200), "attention": Attending, "checkpointed": Checkpointed}
WAYS = {
    "forward": lambda model: of_lr_0(model, placement="forward"),
    "forward, matrix-free": lambda model: of_lr_0(model, placement="forward", ascent="matrix-free"),
    "perturbation": lambda model: nusam.Perturbation(model, 1.0, power_iterations=100),
    "frozen": lambda model: of_lr_0(model, targets=lambda name, _: name.startswith("2"), ascent="matrix-free"),
    "perturbation, frozen": lambda model: nusam.Perturbation(
        model, 1.0, power_iterations=100, targets=lambda name, _: name.startswith("2")
    ),
}


def of_lr_0(model, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    return nusam.NuSAM(torch.optim.SGD(trained, lr=0.0), 1.0, model=model, power_iterations=100, **options)


def gradients_by_hand(model, loss, chosen):
    """At W + ρuvᵀ of the chosen matrices, in float64."""
    model = copy.deepcopy(model).double().requires_grad_()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss(model), parameters.values())
    with torch.no_grad():
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            if p.ndim == 2 and chosen(name):
                U, _, Vh = torch.linalg.svd(gradient)
                p += torch.outer(U[:, 0], Vh[0])
    return dict(zip(parameters, torch.autograd.grad(loss(model), parameters.values()), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_linear_function_of_python_that_reads_its_weight_again_finds_what_it_was_given(
    layer, way, dtype, monkeypatch
):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), LAYERS[layer](), nn.Tanh(), nn.Linear(200, 4))
    model = model.to(dtype)
    model[2].requires_grad_("frozen" not in way)
    x, y = torch.randn(16, 6).to(dtype), torch.randint(0, 4, (16,))

    def loss(model):
        p = next(model.parameters())
        output = model(x.to(p.dtype))
        return nn.functional.cross_entropy(output if p.dtype == torch.float64 else output.float(), y)

    expected = gradients_by_hand(model, loss, lambda name: "frozen" not in way or name.startswith("2"))
    monkeypatch.setattr(linear_of_python, "__module__", "deepspeed.runtime.zero.linear")
    monkeypatch.setattr(nn.functional, "linear", linear_of_python)
    passes = WAYS[way](model)
    for _ in range(3):  # in which layers are compared, and in which they are served
        model.zero_grad()
        for _ in passes.passes():
            loss(model).backward()
    for name, p in model.named_parameters():
        off = 0.0 if p.grad is None else float((p.grad - expected[name]).norm() / expected[name].norm())
        assert off < (0.03 if dtype == torch.bfloat16 else 1e-4), name


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM])
def test_one_autocast_around_both_passes_sees_the_perturbed_weights(kind):
    """Autocast caches its low-precision copy of a weight until its outermost context ends."""
    model = mlp()
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5)
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in opt.passes():
            losses.append(loss_of(model))
            losses[-1].backward()
        losses.append(loss_of(model))
    assert losses[1].item() > losses[0].item() + 0.05
    assert losses[2].item() == pytest.approx(losses[0].item(), abs=1e-2)


def test_a_matrix_without_a_known_layer_is_refused_at_once():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6))

        def forward(self, x):
            return x @ self.weight.mT

    model = Raw()
    with pytest.raises(ValueError, match="no known layer in whose forward ε could live; exclude it with targets="):
        nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, placement="forward")
    # in the weights, it can be perturbed
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent="matrix-free")
    for _ in opt.passes():
        square_loss()(model).backward()
    assert opt.metrics()["fallback/weight: no known layer holds it"] == 1.0


def given_data(a, b):
    b.weight.data = a.weight.data


def given_a_transposed_view(a, b):
    b.weight.data = a.weight.data.T


def of_one_detached_tensor(a, b):
    b.weight = nn.Parameter(a.weight.detach())


def frozen_twin(a, b):
    b.weight = nn.Parameter(a.weight.detach(), requires_grad=False)


def given_rows(a, b):
    b.weight = nn.Parameter(a.weight.data[2:])


IN_DATA = [given_data, given_a_transposed_view]
SHARING = [(share, "before") for share in (*IN_DATA, of_one_detached_tensor, frozen_twin, given_rows)]
SHARING += [(share, when) for share in IN_DATA for when in ("after", "later")]


def three_layers(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


@pytest.mark.parametrize(("share", "when"), SHARING)
@pytest.mark.parametrize("options", [{"placement": "forward"}, {"dtype": torch.bfloat16}])
def test_two_parameters_with_one_memory_have_no_epsilon_in_the_forward(share, when, options):
    dtype = options.get("dtype", torch.float64)
    model = three_layers(dtype)
    if share is given_rows:
        model[2] = nn.Linear(6, 4, dtype=dtype)
        model[4] = nn.Linear(4, 3, dtype=dtype)
    x = torch.ones(4, 6, dtype=dtype)
    options = {name: value for name, value in options.items() if name != "dtype"}
    if when == "before":
        share(model[0], model[2])
    with pytest.raises(ValueError, match=r"are two parameters with the same memory, .* make them one"):
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)
        if when == "after":
            share(model[0], model[2])
        for step in range(3):
            if when == "later" and step == 2:
                share(model[0], model[2])
            before = weights(model)
            for _ in opt.passes():
                model(x).square().mean().backward()
            opt.step()
    assert all(map(torch.equal, weights(model), before)) if when != "before" else True


@pytest.mark.parametrize("share", IN_DATA)
def test_two_parameters_with_one_memory_have_both_epsilons_in_the_weights(share):
    model = three_layers()
    share(model[0], model[2])
    x = torch.randn(4, 6, dtype=torch.float64)
    (model(x) - 1).square().mean().backward()
    pairs = {}
    for parameter in (p for p in model.parameters() if p.ndim == 2):
        U, _, Vh = torch.linalg.svd(parameter.grad)
        pairs[parameter] = 0.3 * torch.outer(U[:, 0], Vh[0])
    before = weights(model)
    with torch.no_grad():
        for parameter, epsilon in pairs.items():
            parameter += epsilon
    model.zero_grad()
    (model(x) - 1).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3, model=model, power_iterations=300)
    for _ in opt.passes():
        (model(x) - 1).square().mean().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_parts_of_one_memory_that_have_no_entry_in_common_are_two_parameters():
    flat = torch.randn(200, dtype=torch.float64)
    both = torch.randn(6, 12, dtype=torch.float64)
    for rows in (False, True):
        model, plain = three_layers(), three_layers()
        plain.load_state_dict(model.state_dict())
        parts = (flat[:36].view(6, 6), flat[36:72].view(6, 6)) if rows else (both[:, :6], both[:, 6:])
        for layer, part in zip((model[0], model[2]), parts, strict=True):
            layer.weight.data = part.copy_(layer.weight.data)
        x = torch.ones(4, 6, dtype=torch.float64)
        for m in (model, plain):
            opt = nusam.NuSAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m, placement="forward")
            for _ in range(3):
                for _ in opt.passes():
                    m(x).square().mean().backward()
                opt.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ targets


class LoRA(nn.Module):
    """A frozen layer with trainable low-rank factors beside it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.base = nn.Linear(6, 5).to(dtype).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        return self.base(x.to(self.base.weight.dtype)).to(x.dtype) + self.up(self.down(x))


def lora(dtype=torch.float32):
    torch.manual_seed(2)
    return nn.Sequential(LoRA(dtype), nn.GELU(), nn.Linear(5, 3).requires_grad_(False))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_are_perturbed_without_a_gradient_or_a_write(dtype):
    model = lora(dtype)
    before = weights(model)
    frozen = {"0.base.weight": model[0].base.weight, "2.weight": model[2].weight}
    opt = nusam.NuSAM(torch.optim.SGD(trainable(model), lr=0.0), rho=0.2, model=model, targets="frozen")
    assert opt.perturbation_numel() == 5 + 6 + 3 + 5
    losses = []
    for _ in range(3):
        for _pass in opt.passes():
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
            loss = (model(x) - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
            assert all(p.grad is None for p in frozen.values())
            assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
        opt.step()
    assert losses[-1] > losses[-2]
    metrics = opt.metrics()
    assert {k for k in metrics if k.startswith("epsilon/")} == {f"epsilon/{name}" for name in frozen}
    assert all(metrics[f"epsilon/{name}"] == pytest.approx(0.2) for name in frozen)


def test_the_perturbation_of_frozen_weights_is_the_one_their_gradient_gives():
    model = lora().double()
    opt = nusam.NuSAM(torch.optim.SGD(trainable(model), lr=0.0), rho=0.2, model=model, targets="frozen")
    thawed = copy.deepcopy(model).requires_grad_(True)
    reference = nusam.NuSAM(torch.optim.SGD(thawed.parameters(), lr=0.0), rho=0.2, model=thawed, ascent="gradient")
    saved = opt.state_dict()
    for m, o in ((thawed, reference), (model, opt)):
        for _ in o.passes():
            square_loss()(m).backward()
        if o is reference:
            u0 = nusam.lmo.Nuclear().init_state(model[0].base.weight, 0)["u"]
            saved["param_groups"][0]["nusam_outside"] = {
                "0.base.weight": {"u": u0},
                "2.weight": {"u": torch.ones(3) / 3},
            }
            opt.load_state_dict(saved)
    G = {}
    loss = square_loss()(thawed)
    G["0.base.weight"], G["2.weight"] = torch.autograd.grad(loss, [thawed[0].base.weight, thawed[2].weight])
    for name, start in (("0.base.weight", u0), ("2.weight", torch.ones(3).double() / 3)):
        parameter = dict(model.named_parameters())[name]
        u, _ = svd_top1(G[name] / G[name].abs().max(), start)
        assert torch.linalg.vector_norm(opt._states[parameter]["u"] - u) <= 1e-12


class Residual(nn.Module):
    """A frozen block that adds to its input: torch keeps no input of a frozen layer, so that it may be overwritten."""

    def __init__(self, how):
        super().__init__()
        self.up, self.down, self.how = nn.Linear(12, 24), nn.Linear(24, 12), how
        self.in_place = True

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        if self.how == "added":
            return x.add_(y) if self.in_place else x + y
        if self.how == "scaled":
            return x.mul_(0.5) + y if self.in_place else x * 0.5 + y
        if self.how == "row by row":
            x = x if self.in_place else x.clone()
            x[:2] = y[:2]
            return x
        x = x if self.in_place else x.clone()
        return y + nn.functional.relu(x, inplace=True)


@pytest.mark.parametrize("how", ["added", "scaled", "row by row", "activated"])
@pytest.mark.parametrize("begins", [0, 3, 4])
@pytest.mark.parametrize("ascent", ["auto", "matrix-free"])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_input_of_a_frozen_layer_may_be_overwritten(how, begins, ascent, calls):
    """The same as with a copy of it, from the step on in which that begins."""
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        block = Residual(how).requires_grad_(False)
        model = nn.Sequential(nn.Linear(6, 12), *[block] * calls, nn.Linear(12, 3)).double()
        options = {"rho": 0.3, "targets": "frozen", "ascent": ascent, "power_iterations": 30}
        opt = nusam.NuSAM(torch.optim.SGD(trainable(model), lr=0.01), model=model, **options)
        gradients = []
        for step in range(6):
            block.in_place = in_place and step >= begins
            x = torch.randn(8, 6, dtype=torch.float64)
            for _ in opt.passes():
                (model(x) - 1).square().mean().backward()
            gradients += [p.grad.clone() for p in trainable(model)]
            opt.step()
        assert {name for name in opt.metrics() if "epsilon" in name} == {"epsilon/1.up.weight", "epsilon/1.down.weight"}
        found.append(gradients)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def batch_of(step):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + 1


def usual(model, step):
    return (model(batch_of(step)) - 1.5).square().mean()


def gradient_penalty(model, step):
    x = batch_of(step).requires_grad_()
    (slopes,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return usual(model, step) + (slopes.norm(dim=1) - 1).square().mean()


def mapped(model, step):
    return (torch.func.vmap(model)(batch_of(step)) - 1.5).square().mean()


def distance_to_it(model, step):
    return usual(model, step) + 0.1 * (model[4].weight @ model[2].weight).square().sum()


def multiplied_once_more(model, step):
    return usual(model, step) + F.linear(model[0](batch_of(step)), model[2].weight).square().mean()


def called_with_others(model, step):
    given = {"weight": model[2].weight * 1.1, "bias": model[2].bias}
    y = torch.func.functional_call(model[2], given, (model[:2](batch_of(step)),))
    return (model[3:](y) - 1.5).square().mean()


ODD_USES = [gradient_penalty, mapped, distance_to_it, multiplied_once_more, called_with_others]


@pytest.mark.parametrize("begins", [0, 3])
@pytest.mark.parametrize("odd", ODD_USES)
def test_a_frozen_weight_that_is_also_used_otherwise_has_its_perturbation_in_every_step(odd, begins):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    model[2].requires_grad_(False)
    plain = copy.deepcopy(model)
    base = torch.optim.SGD(trainable(model), lr=0.05)
    own = torch.optim.SGD(trainable(plain), lr=0.05)
    opt = nusam.NuSAM(base, rho=0.3, model=model, targets="frozen", placement="weights", power_iterations=150)
    W = plain[2].weight
    for step in range(begins + 4):
        loss = usual if step < begins else odd
        for _ in opt.passes():
            loss(model, step).backward()
        opt.step()
        W.requires_grad_(True)
        (G,) = torch.autograd.grad(loss(plain, step), W)
        W.requires_grad_(False)
        own.zero_grad()
        before = W.clone()
        U, _, Vh = torch.linalg.svd(G)
        W.add_(0.3 * torch.outer(U[:, 0], Vh[0]))
        loss(plain, step).backward()
        W.copy_(before)
        own.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def hooked_before_it_was_frozen(model):
    model[2].weight.requires_grad_().register_hook(lambda gradient: gradient)
    model[2].weight.requires_grad_(False)


@pytest.mark.parametrize("options", [{}, {"placement": "weights"}])
def test_a_frozen_weight_without_any_gradient_is_refused(options):
    model = lora()
    base = torch.optim.SGD(trainable(model), lr=0.1)
    options = {"model": model, "targets": lambda name, _: name == "2.weight", **options}
    with pytest.raises(ValueError, match="is frozen and has no gradient, which ascent='gradient' needs"):
        nusam.NuSAM(base, ascent="gradient", **options)
    hooked_before_it_was_frozen(model)
    opt = nusam.NuSAM(base, **options)
    with pytest.raises(RuntimeError, match=r"2\.weight is .*given a hook on its gradient.*exclude it with targets="):
        for _ in opt.passes():
            square_loss()(model).backward()


def test_frozen_perturbations_resume():
    runs = []
    for resumed in (False, True):
        model = lora()
        opt = nusam.NuSAM(torch.optim.AdamW(trainable(model), lr=1e-2), rho=0.1, model=model, targets="frozen")
        for step in range(6):
            if resumed and step == 3:
                saved, state = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
                model = lora()
                model.load_state_dict(state)
                opt = nusam.NuSAM(torch.optim.AdamW(trainable(model), lr=1e-2), rho=0.1, model=model, targets="frozen")
                opt.load_state_dict(saved)
            for _ in opt.passes():
                square_loss(step)(model).backward()
            opt.step()
        runs.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_predicate_chooses_among_all_parameters():
    model = lora()
    opt = nusam.NuSAM(
        torch.optim.SGD(trainable(model), lr=0.0),
        model=model,
        targets=lambda name, p: name.endswith(("base.weight", "up.weight")),
    )
    for _ in opt.passes():
        square_loss()(model).backward()
    assert {k for k in opt.metrics() if "epsilon" in k} == {"epsilon/0.base.weight", "epsilon/0.up.weight"}


def test_no_frozen_matrix_is_an_error():
    model = mlp()
    with pytest.raises(ValueError, match="nothing to perturb: the model holds no frozen 2-D parameter"):
        nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, targets="frozen")
