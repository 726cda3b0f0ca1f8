"""A convolution's kernel counts as the matrix (o, i/g·k·…), in every way and setting: held to an SVD."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nusam
from nusam.layers.convolutions import Convolution

RHO = 0.1
WAYS = {
    "gradient": {"ascent": "gradient", "placement": "weights"},
    "matrix-free": {"ascent": "matrix-free", "placement": "weights"},
    "forward": {"ascent": "matrix-free", "placement": "forward"},
    "gradient in the forward": {"ascent": "gradient", "placement": "forward"},
}


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Subclass(nn.Conv2d):
    """Adds nothing to what is known."""


class OwnForward(nn.Conv2d):
    """Standardizes its weight, as timm's StdConv2d does."""

    def forward(self, x):
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, W, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Unbatched(nn.Module):
    """A convolution of one sample, without a dimension of samples."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x[0])


def last(conv):
    return conv.to(memory_format=torch.channels_last)


LINE, IMAGE, VOLUME = (4, 4, 9), (4, 4, 7, 6), (3, 4, 5, 4, 5)
LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 5, 3), LINE),
    "1d stride, padding, dilation": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2, bias=False), LINE),
    "1d groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), LINE),
    "1d same, even": (lambda: nn.Conv1d(4, 5, 4, padding="same"), LINE),
    "1d replicate": (lambda: nn.Conv1d(4, 5, 3, padding=2, padding_mode="replicate", stride=2), LINE),
    "1d unbatched": (lambda: Unbatched(nn.Conv1d(4, 5, 3, padding=1)), LINE),
    "2d": (lambda: nn.Conv2d(4, 5, 3), IMAGE),
    "2d stride": (lambda: nn.Conv2d(4, 5, 3, stride=(2, 3), padding=1), IMAGE),
    "2d one by one": (lambda: nn.Conv2d(4, 5, 1, stride=2, bias=False), IMAGE),
    "2d dilation": (lambda: nn.Conv2d(4, 5, (3, 2), padding=(2, 1), dilation=(2, 3)), IMAGE),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), IMAGE),
    "2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), IMAGE),
    "2d valid": (lambda: nn.Conv2d(4, 5, 3, padding="valid"), IMAGE),
    "2d same": (lambda: nn.Conv2d(4, 5, 3, padding="same", dilation=2), IMAGE),
    "2d same, even and odd": (lambda: nn.Conv2d(4, 5, (2, 3), padding="same"), IMAGE),
    "2d same, both even": (lambda: nn.Conv2d(4, 5, (2, 4), padding="same", groups=1), IMAGE),
    "2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", groups=2), IMAGE),
    "2d reflect, same": (lambda: nn.Conv2d(4, 5, (3, 2), padding="same", padding_mode="reflect"), IMAGE),
    "2d channels_last": (lambda: last(nn.Conv2d(4, 5, 3, padding=1, stride=2)), IMAGE),
    "2d channels_last groups": (lambda: last(nn.Conv2d(4, 6, (3, 2), groups=2)), IMAGE),
    "2d unbatched": (lambda: Unbatched(nn.Conv2d(4, 5, 3, padding=1)), IMAGE),
    "2d unbatched circular": (lambda: Unbatched(nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular")), IMAGE),
    "2d subclass": (lambda: Subclass(4, 5, 3), IMAGE),
    "3d": (lambda: nn.Conv3d(4, 5, 2), VOLUME),
    "3d stride, groups": (lambda: nn.Conv3d(4, 6, (3, 2, 3), stride=2, padding=(1, 0, 1), groups=2), VOLUME),
    "3d dilation, same": (lambda: nn.Conv3d(4, 5, (2, 1, 3), padding="same", dilation=(1, 1, 2)), VOLUME),
    "3d channels_last": (
        lambda: nn.Conv3d(4, 5, 3, padding=1, bias=False).to(memory_format=torch.channels_last_3d),
        VOLUME,
    ),
}
BY_GRADIENT = {
    "own forward": (lambda: OwnForward(4, 5, 3), IMAGE),
    "own _conv_forward": (lambda: OwnConvForward(4, 5, 3), IMAGE),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 3)), IMAGE),
}


class Net(nn.Module):
    """A layer between two that let no position be like another."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer = layer
        self.register_buffer("before", torch.randn(shape[1:]))
        self.after = nn.Linear(layer(torch.randn(shape)).flatten(1).shape[1], 3)

    def forward(self, x):
        return self.after(self.layer((x * self.before).tanh()).relu().flatten(1))


def build(case, dtype=torch.float64):
    torch.manual_seed(7)
    layer, shape = {**LAYERS, **BY_GRADIENT}[case]
    return Net(layer(), shape).to(dtype), 2 * torch.randn(shape, dtype=torch.float64).to(dtype)


def loss_of(model, x):
    y = model(x)
    return (y * torch.linspace(-1, 2, y.shape[1]).to(y)).sin().sum()


def kernels(model):
    """All matrices but gains: (o, 1, …) is a vector."""
    return [p for p in model.parameters() if p.ndim > 1 and sum(length > 1 for length in p.shape) > 1]


def by_svd(model, x, loss=loss_of, rho=RHO, norm=False):
    """Gradients at x + ε, with ε from an SVD of every kernel's gradient as a matrix."""
    parameters, chosen = list(model.parameters()), kernels(model)
    triples = []
    for G in torch.autograd.grad(loss(model, x), chosen):
        U, S, Vh = torch.linalg.svd(G.reshape(G.shape[0], -1), full_matrices=False)
        triples.append((torch.outer(U[:, 0], Vh[0]).reshape(G.shape), S[0]))
    joint = torch.stack([sigma for _, sigma in triples]).norm()
    before = [p.detach().clone() for p in chosen]
    with torch.no_grad():
        for p, (direction, sigma) in zip(chosen, triples, strict=True):
            p += rho * direction * (sigma / joint if norm else 1)
    gradients = torch.autograd.grad(loss(model, x), parameters)
    with torch.no_grad():
        for p, w in zip(chosen, before, strict=True):
            p.copy_(w)
    return gradients


def method(model, way="matrix-free", base=None, kind=nusam.NuSAM, iterations=400, **options):
    base = base or torch.optim.SGD(model.parameters(), lr=0.0)
    options = {**WAYS[way], **options}
    return kind(base, RHO, model=model, power_iterations=iterations, convolutions=True, **options)


def fallbacks(opt):
    return {key.split("/")[1].split(":")[0] for key in opt.metrics() if key.startswith("fallback/")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LAYERS)
def test_a_step_is_that_of_an_svd(case, way):
    model, x = build(case)
    wanted = by_svd(model, x)
    before = [p.detach().clone() for p in model.parameters()]
    opt = method(model, way)
    for step in range(3):  # one that compares, two that do not
        for name in opt.passes():
            loss_of(model, x).backward()
            if name == "ascent" and step == 1 and WAYS[way]["ascent"] == "matrix-free":
                assert all(p.grad is None for p in kernels(model))
        for p, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-6)
        for p, w in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=0 if "forward" in way else 1e-15)
            assert p.stride() == w.stride()
    assert not fallbacks(opt)


@pytest.mark.parametrize("case", BY_GRADIENT)
def test_a_layer_that_is_not_known_is_served_by_its_gradient(case):
    model, x = build(case)
    wanted = by_svd(model, x)
    opt = method(model)
    for _ in range(3):
        for _ in opt.passes():
            loss_of(model, x).backward()
        for p, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-6)
    assert any(name.startswith("layer.") for name in fallbacks(opt))
    with pytest.raises(ValueError, match="no known layer in whose forward"):
        method(model, "forward")


@pytest.mark.parametrize("case", ["1d groups", "2d circular", "2d channels_last", "3d stride, groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ascents_agree_from_step_to_step(case, dtype):
    """One power iteration a step, from the same warm starts, with momentum."""
    found = []
    for way in WAYS:
        model, x = build(case, dtype)
        opt = method(model, way, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), iterations=1)
        for _ in range(6):
            for _ in opt.passes():
                loss_of(model, x).backward()
            opt.step()
        found.append(list(model.parameters()))
        assert not fallbacks(opt)
    for others in found[1:]:
        for p, q in zip(others, found[0], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_one_radius_for_all_layers_counts_kernels():
    model, x = build("2d groups")
    wanted = by_svd(model, x, norm=True)
    opt = method(model, kind=nusam.NuSAMNorm)
    for _ in range(2):
        for _ in opt.passes():
            loss_of(model, x).backward()
        for p, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ what surrounds a layer


class Blocks(nn.Module):
    """Two convolutions, one of them repeated if told so, and checkpointed if told so."""

    def __init__(self, reentrant=None, times=1):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding="same", groups=2)
        self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(6, 4)
        self.reentrant, self.times = reentrant, times

    def block(self, x):
        for _ in range(self.times):
            x = F.relu(self.norm(self.conv(x)), inplace=True)
        return x

    def forward(self, x):
        x = self.stem(x).relu_()
        x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def images(dtype=torch.float64, count=4):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 9, 8, generator=generator, dtype=torch.float64).to(dtype)


def trained(model, way, steps=4, call=None, x=None, **options):
    opt = method(model, way, torch.optim.SGD(model.parameters(), lr=0.05), iterations=1, **options)
    x = images(next(model.parameters()).dtype) if x is None else x
    for _ in range(steps):
        for _ in opt.passes():
            loss_of(model if call is None else call, x).backward()
        opt.step()
    return opt


def assert_same(model, other, atol=1e-12):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["matrix-free", "forward"])
def test_checkpointed_convolutions(way, reentrant):
    plain, checkpointed = Blocks().double(), Blocks(reentrant).double()
    checkpointed.load_state_dict(plain.state_dict())
    trained(plain, "gradient")
    assert not fallbacks(trained(checkpointed, way))
    assert_same(checkpointed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["matrix-free", "forward"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_convolutions_have_one_graph_a_kind_of_pass(way):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    plain = Blocks().double()
    plain.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="circular").double()
    model = copy.deepcopy(plain)
    graphs = CompileCounterWithBackend("aot_eager")
    trained(plain, "gradient", 5)
    opt = trained(model, way, 5, torch.compile(model, backend=graphs, fullgraph=True))
    assert not fallbacks(opt)
    assert_same(model, plain)
    assert graphs.frame_count == 3


@pytest.mark.parametrize("way", ["matrix-free", "forward"])
def test_convolutions_under_autocast(way):
    """As far from float32's step as autocast itself is."""
    exact = Blocks()
    start, coarse, model = copy.deepcopy(exact), copy.deepcopy(exact), copy.deepcopy(exact)
    trained(exact, "gradient", 2)

    def with_autocast(net):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return net(x).float()

        return call

    trained(coarse, "gradient", 2, with_autocast(coarse))
    assert not fallbacks(trained(model, way, 2, with_autocast(model)))
    for name, wanted in exact.state_dict().items():
        moved = torch.linalg.vector_norm(wanted - start.state_dict()[name])
        usual, found = (torch.linalg.vector_norm(net.state_dict()[name] - wanted) for net in (coarse, model))
        assert found <= 3 * usual + 0.1 * moved, name


def test_weights_in_bfloat16_are_not_written():
    model = Blocks().to(torch.bfloat16)
    opt = method(model, "matrix-free", placement="auto", iterations=1)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(2):
        for _ in opt.passes():
            loss = loss_of(model, images(torch.bfloat16))
            loss.backward()
            losses.append(float(loss.detach()))
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert losses[1] > losses[0]
    assert opt.metrics()["epsilon/stem.weight"] == pytest.approx(RHO)


@pytest.mark.parametrize("way", ["matrix-free", "forward"])
def test_a_convolution_that_is_used_twice(way):
    plain = Blocks(times=2).double()
    model = copy.deepcopy(plain)
    trained(plain, "gradient")
    assert fallbacks(trained(model, way)) == {"conv.weight"}
    assert_same(model, plain)


@pytest.mark.parametrize("way", ["matrix-free", "forward"])
def test_settings_that_change_on_the_way(way):
    plain = Blocks().double()
    model = copy.deepcopy(plain)
    found = []
    for net, how in ((plain, "gradient"), (model, way)):
        opt = method(net, how, torch.optim.SGD(net.parameters(), lr=0.05), iterations=1)
        for dilation in (1, 1, 2, 2):
            net.conv.dilation = (dilation, dilation)
            for _ in opt.passes():
                loss_of(net, images()).backward()
            opt.step()
        found.append(opt)
    assert_same(model, plain)
    assert not fallbacks(found[1])


def test_a_function_that_was_patched_keeps_its_gradient(monkeypatch):
    plain = Blocks().double()
    model = copy.deepcopy(plain)
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *rest: conv2d(3 * x, *rest))
    trained(plain, "gradient")
    assert fallbacks(trained(model, "matrix-free")) == {"stem.weight", "conv.weight"}
    assert_same(model, plain)


def test_a_penalty_on_the_gradient_of_the_input():
    def loss(model, x):
        x = x.clone().requires_grad_()
        y = loss_of(model, x)
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return y + 0.1 * g.square().sum()

    plain = Blocks().double()
    model = copy.deepcopy(plain)
    for net, how in ((plain, "gradient"), (model, "matrix-free")):
        opt = method(net, how, torch.optim.SGD(net.parameters(), lr=0.01), iterations=1)
        for _ in range(3):
            for _ in opt.passes():
                loss(net, images()).backward()
            opt.step()
    assert_same(model, plain)


def test_frozen_kernels_are_perturbed_by_what_their_layers_pass_on():
    model = Blocks().double()
    for p in (model.stem.weight, model.conv.weight):
        p.requires_grad_(False)
    thawed = copy.deepcopy(model).requires_grad_(True)
    chosen = ["stem.weight", "conv.weight"]
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    opt = method(model, base=base, targets="frozen", ascent="auto", placement="auto")
    for _ in range(2):
        for _ in opt.passes():
            loss_of(model, images()).backward()
    named = dict(thawed.named_parameters())
    gradients = torch.autograd.grad(loss_of(thawed, images()), [named[name] for name in chosen])
    with torch.no_grad():
        for name, G in zip(chosen, gradients, strict=True):
            U, _, Vh = torch.linalg.svd(G.flatten(1), full_matrices=False)
            named[name] += RHO * torch.outer(U[:, 0], Vh[0]).view(G.shape)
    loss_of(thawed, images()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, named[name].grad, rtol=0, atol=1e-6)


def test_whoever_reads_a_kernel_in_the_descent_finds_epsilon():
    model = Blocks().double()
    opt = method(model, "forward")
    before = model.conv.weight.detach().clone()
    for _ in range(2):
        for name in opt.passes():
            loss_of(model, images()).backward()
            if name == "descent":
                opt._backwards._in_ascent += 1  # the loop is not through
                read = model.conv.weight.detach() - before
    assert torch.linalg.matrix_norm(read.flatten(1), "nuc") == pytest.approx(RHO)
    assert torch.linalg.matrix_rank(read.flatten(1), atol=1e-9) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_where_it_was_saved(way):
    whole = Blocks().double()
    half = copy.deepcopy(whole)
    trained(whole, way, 6)
    opt = trained(half, way, 3)
    saved = copy.deepcopy(half.state_dict()), copy.deepcopy(opt.state_dict())
    resumed = Blocks().double()
    resumed.load_state_dict(saved[0])
    opt = method(resumed, way, torch.optim.SGD(resumed.parameters(), lr=0.05), iterations=1)
    opt.load_state_dict(saved[1])
    for _ in range(3):
        for _ in opt.passes():
            loss_of(resumed, images()).backward()
        opt.step()
    assert_same(resumed, whole, 1e-15 if way == "gradient" else 1e-13)


class MixtureOfPaths(nn.Module):
    """Samples go through one of two convolutions; one of them may get none."""

    def __init__(self):
        super().__init__()
        self.paths = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)])
        self.grouped, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 4)

    def forward(self, x):
        parts = (x[x[:, 0, 0, 0] > 9], x[x[:, 0, 0, 0] <= 9])
        x = torch.cat([path(part) for path, part in zip(self.paths, parts, strict=True)])
        grouped = torch.cat([self.grouped(x[:0].tanh()), self.grouped(x.tanh())])
        return self.head(grouped.mean((2, 3)))


@pytest.mark.parametrize("way", ["matrix-free", "forward"])
def test_no_samples_at_all(way):
    plain = MixtureOfPaths().double()
    model = copy.deepcopy(plain)
    trained(plain, "gradient")
    trained(model, way)
    assert_same(model, plain)


def test_one_kernel_in_two_layers_of_other_settings():
    plain = Blocks().double()
    plain.stem = nn.Sequential(plain.stem, nn.Conv2d(6, 6, 3, padding=1, groups=2).double())
    plain.stem[1].weight = plain.conv.weight
    model = copy.deepcopy(plain)
    trained(plain, "gradient")
    assert fallbacks(trained(model, "matrix-free")) == {"stem.1.weight"}
    assert_same(model, plain)


@pytest.mark.parametrize("transform", ["vmap", "functional_call", "no gradient"])
def test_what_goes_another_way_than_by_a_call_of_the_layer(transform):
    class Net(Blocks):
        def forward(self, x):
            x = self.stem(x).relu()
            if transform == "vmap":
                x = torch.vmap(self.conv)(x)
            elif transform == "functional_call":
                x = torch.func.functional_call(self.conv, {"weight": 2 * self.conv.weight}, (x,))
            else:
                with torch.no_grad():
                    target = self.conv(x)
                x = self.conv(x) * target
            return self.head(x.mean((2, 3)))

    plain = Net().double()
    model = copy.deepcopy(plain)
    trained(plain, "gradient")
    opt = trained(model, "matrix-free")
    assert fallbacks(opt) == (set() if transform == "no gradient" else {"conv.weight"})
    assert_same(model, plain)


def test_updates_inside_the_backward():
    plain = Blocks().double()
    model = copy.deepcopy(plain)
    trained(plain, "gradient")
    opt = method(model, base=torch.optim.SGD(model.parameters(), lr=0.05), iterations=1, placement="auto")
    nusam.step_in_backward(opt)
    for _ in range(4):
        for _ in opt.passes():
            loss_of(model, images()).backward()
        opt.step()
    assert_same(model, plain)


# ------------------------------------------------------------------ one pass


class Convolving(nn.Module):
    """Convolutions, norms and a matrix, without statistics of a batch."""

    def __init__(self, one_by_one=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.conv = nn.Conv2d(6, 6, 3, padding="same", groups=2)
        self.norm, self.head = nn.GroupNorm(2, 6), nn.Linear(6, 4)
        self.one_by_one = one_by_one

    def forward(self, x):
        x = torch.stack([self.stem(sample) for sample in x]) if self.one_by_one else self.stem(x)
        return self.head(self.norm(self.conv(x.tanh())).relu().mean((2, 3)))


def one_pass_by_hand(model, batches, rate, share):
    """ε of the next batch's first samples, at the weights before the update; the first two steps find it anew."""
    parameters, chosen, waiting = list(model.parameters()), kernels(model), None

    def ascent(batch):
        found = []
        for G in torch.autograd.grad(loss_of(model, batch[: int(len(batch) * share)]), chosen):
            U, _, Vh = torch.linalg.svd(G.flatten(1), full_matrices=False)
            found.append(RHO * torch.outer(U[:, 0], Vh[0]).view(G.shape))
        return found

    for number, batch in enumerate(batches):
        epsilons = ascent(batch) if waiting is None else waiting
        waiting = ascent(batches[number + 1]) if 0 < number < len(batches) - 1 else None
        with torch.no_grad():
            torch._foreach_add_(chosen, epsilons)
        gradients = torch.autograd.grad(loss_of(model, batch), parameters)
        with torch.no_grad():
            torch._foreach_sub_(chosen, epsilons)
            torch._foreach_sub_(parameters, [rate * gradient for gradient in gradients])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_pass_tells_samples_of_convolutions_apart(layout):
    by_hand = Convolving().double().to(memory_format=layout)
    model = copy.deepcopy(by_hand)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(8, 3, 9, 8, generator=generator, dtype=torch.float64) for _ in range(6)]
    one_pass_by_hand(by_hand, batches, 0.05, 1 / 4)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    opt = method(model, base=base, ascent="auto", placement="auto", ascent_share=1 / 4, iterations=200)
    for _ in opt.one_pass(batches, partial(loss_of, model)):
        opt.step()
    assert_same(model, by_hand, 1e-7)


def test_one_pass_falls_back_where_a_convolution_gets_one_sample_at_a_time():
    model = Convolving(one_by_one=True).double()
    opt = method(model, ascent="auto", placement="auto", ascent_share=1 / 4)

    def run():
        for _ in opt.one_pass([images(count=8)] * 4, partial(loss_of, model)):
            opt.step()

    with pytest.warns(UserWarning, match=r"one_pass\(\) can't tell the samples apart") as told:
        run()
    assert len(told) == 1


# ------------------------------------------------------------------ what counts as a kernel


class Others(nn.Module):
    """Parameters of three and more dimensions that are no kernels of convolutions."""

    def __init__(self):
        super().__init__()
        self.position, self.stack = nn.Parameter(torch.randn(1, 4, 6)), nn.Parameter(torch.randn(3, 4, 5))
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2)
        self.line, self.volume = nn.Conv1d(2, 3, 2), nn.Conv3d(2, 3, 2, groups=1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_kernels_of_the_models_convolutions_are_perturbed_and_nothing_else():
    model = Others()
    found = nusam.NuSAM(sgd(model), model=model, convolutions=True).coverage()
    assert found.perturbed == sum(m.weight.numel() for m in (model.conv, model.line, model.volume))
    for name in ("position", "stack", "up.weight", "conv.bias"):
        assert found.left_out[name].endswith(": NuSAM perturbs a 2-D parameter or the kernel of a convolution only")
    assert found.left_out["up.weight"].startswith("(4, 3, 2, 2)")
    with pytest.raises(ValueError, match="nothing to perturb"):  # as ever
        nusam.NuSAM(sgd(model), model=model)
    blind = nusam.NuSAM(sgd(model), convolutions=True).coverage()  # nobody tells kernels from others
    assert blind.perturbed == sum(p.numel() for p in model.parameters() if p.ndim > 2)


class WithGain(nn.Conv2d):
    """Scales each filter, as timm's ScaledStdConv2d does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        return self._conv_forward(x, self.gain * self.weight, self.bias)


@pytest.mark.parametrize(
    ("conv", "kernel", "gain"),
    [
        (lambda: WithGain(3, 4, 3), "weight", "gain"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            "parametrizations.weight.original1",
            "parametrizations.weight.original0",
        ),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3), dim=1),
            "parametrizations.weight.original1",
            "parametrizations.weight.original0",
        ),
    ],
    ids=["own", "weight norm", "weight norm by columns"],
)
def test_the_gains_of_a_kernels_rows_are_no_kernel(conv, kernel, gain):
    model = conv()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, convolutions=True)
    assert gain in opt.coverage().left_out
    assert kernel not in opt.coverage().left_out


def test_a_kernel_of_one_entry_a_row_is_one():
    model = nn.Conv2d(4, 4, 1, groups=4)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, convolutions=True)
    assert "weight" not in opt.coverage().left_out


def test_what_is_a_kernel_stays_one_when_the_model_is_let_go():
    model = Others()
    opt = nusam.NuSAM(sgd(model), model=model, convolutions=True)
    covered = opt.coverage().perturbed
    opt.detach()
    assert opt.coverage().perturbed == covered
    assert copy.deepcopy(opt).coverage().perturbed == covered


def test_a_resnet_goes_from_its_head_to_all_of_its_weights():
    model = timm.create_model("resnet18", num_classes=10)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    without = nusam.NuSAM(sgd(model), model=model).coverage()
    assert without.perturbed == model.fc.weight.numel()
    assert without.share < 0.0005
    opt = nusam.NuSAM(sgd(model), model=model, convolutions=True)
    found = opt.coverage()
    assert found.perturbed == sum(p.numel() for p in weights.values())
    assert not weights.keys() & found.left_out.keys()
    assert found.share > 0.999
    floats = sum(p.shape[0] + p[0].numel() for p in weights.values())
    both = partial(nusam.NuSAM, convolutions=True)
    assert opt.perturbation_numel() == nusam.perturbation_numel(model, both) == floats
    assert nusam.memory.footprint(model, both).perturbation == 4 * floats
    with torch.device("meta"):
        assert nusam.perturbation_numel(timm.create_model("resnet18", num_classes=10), both) == floats


@pytest.mark.filterwarnings("error")
def test_a_resnet_is_served_by_its_layers():
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), 0.01, model=model, convolutions=True)
    losses = []
    for _ in range(2):
        for name in opt.passes():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(float(loss.detach()))
            large = [p for p in model.parameters() if p.ndim > 1 and p.numel() >= 2**16]
            if name == "ascent" and len(losses) > 2:
                assert all(p.grad is None for p in large)
        opt.step()
    assert not fallbacks(opt)
    assert losses[1] > losses[0]
    assert losses[3] > losses[2]


def test_the_warning_of_a_small_reach_names_the_option():
    model = timm.create_model("resnet18", num_classes=10)

    def step(opt):
        for _ in opt.passes():
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        opt.step()

    with pytest.warns(UserWarning, match=r"would perturb, and convolutions=True as far as they are kernels\.$"):
        step(nusam.NuSAM(sgd(model), model=model))
    step(nusam.NuSAM(sgd(model), model=model, convolutions=True))


def test_what_is_given_must_be_true_or_false():
    with pytest.raises(ValueError, match="convolutions must be True or False, got 1"):
        nusam.NuSAM(sgd(nn.Linear(2, 2)), convolutions=1)


def test_a_lazy_layer_is_refused_in_one_sentence():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(ValueError, match="run the model once before it"):
        nusam.NuSAM(sgd(model), model=model, convolutions=True)


def test_products_form_neither_the_gradient_nor_patches():
    """Of a convolution as large as its gradient is, no tensor of either size is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not getattr(func, "is_view", False):
                for leaf in torch.utils._pytree.tree_leaves(out):
                    self.entries = max(self.entries, leaf.numel() if isinstance(leaf, torch.Tensor) else 0)
            return out

    conv = nn.Conv2d(32, 64, 5, padding=2)
    from nusam.layers.convolutions import convolution_of

    kind = convolution_of(conv)
    assert issubclass(kind, Convolution)
    X, D = torch.randn(1, 32, 4, 4), torch.randn(1, 64, 4, 4)
    with Largest() as largest:
        Gv = kind.matvec(X, D, torch.randn(32 * 25), 64)
        Gu = kind.rmatvec(X, D, torch.randn(64))
    assert Gv.shape == (64,)
    assert Gu.shape == (32 * 25,)
    assert largest.entries <= 64 * 4 * 4 < min(conv.weight.numel(), X.numel() * 25)
