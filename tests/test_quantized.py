"""Frozen quantized weights are perturbed in the forward, as the dense weights that they stand for would be."""

import copy
import io

import pytest
import torch
from torch import nn

import nusam
from tests import low_precision

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 4))


def with_torchao(net):
    quantization = pytest.importorskip("torchao.quantization")
    for layer in (net[0], net[2]):
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return net, lambda layer: layer.weight.dequantize()


def with_4_bits(net):
    bnb = pytest.importorskip("bitsandbytes")
    for i in (0, 2):
        layer = bnb.nn.Linear4bit(net[i].in_features, net[i].out_features, compute_dtype=torch.float32)
        layer.load_state_dict(net[i].state_dict())
        net[i] = layer.to("cpu")
    net(torch.zeros(1, 64))  # the first forward settles how they compute
    return net, lambda layer: bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


QUANTIZED = {"torchao int8": with_torchao, "bitsandbytes 4-bit": with_4_bits}


@pytest.fixture(params=QUANTIZED)
def pair(request):
    """A model with frozen quantized layers, and the same with the dense weights that these stand for."""
    quantized, entries = QUANTIZED[request.param](model())
    dense = model()
    for i in (0, 2):
        quantized[i].requires_grad_(False)
        with torch.no_grad():
            dense[i].weight.copy_(entries(quantized[i]))
    dense[0].requires_grad_(False)
    dense[2].requires_grad_(False)
    return quantized, dense


def losses_and_head(net, kind, **options):
    """Losses of the passes of three steps, and the trained head."""
    base = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    opt = kind(base, rho=0.5, model=net, targets="frozen", **options)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 64, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        for _ in opt.passes():
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            losses.append(loss.item())
        opt.step()
    return torch.tensor(losses), net[4].weight.detach(), opt


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.NuSAMNorm])
@pytest.mark.parametrize("iterations", [1, 3])
def test_quantized_weights_are_perturbed_as_dense_ones(pair, kind, iterations):
    quantized, dense = pair
    losses, head, opt = losses_and_head(quantized, kind, power_iterations=iterations)
    expected_losses, expected_head, reference = losses_and_head(dense, kind, power_iterations=iterations)
    assert (losses[1::2] > losses[::2] + 0.01).all()
    torch.testing.assert_close(losses, expected_losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(head, expected_head, rtol=1e-2, atol=1e-3)
    metrics, others = opt.metrics(), reference.metrics()
    assert metrics.keys() == others.keys()
    assert {"sigma/0.weight", "epsilon/2.weight"} <= metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(others[name], rel=0.02)


def test_nothing_is_written_and_no_gradient_is_formed(pair):
    quantized, _ = pair
    before = copy.deepcopy(quantized.state_dict())
    losses_and_head(quantized, nusam.NuSAM)
    after = quantized.state_dict()
    for name in before:
        if name.startswith(("0.", "2.")):
            old, new = (s[name].dequantize() if hasattr(s[name], "qdata") else s[name] for s in (before, after))
            assert torch.equal(old, new), name
    assert all(quantized[i].weight.grad is None for i in (0, 2))
    assert not any("forward" in vars(module) for module in quantized.modules())


def test_state_of_quantized_weights_is_saved_and_loaded(pair):
    quantized, _ = pair
    _, _, opt = losses_and_head(quantized, nusam.NuSAM)
    base = torch.optim.SGD([p for p in quantized.parameters() if p.requires_grad], lr=0.1)
    resumed = nusam.NuSAM(base, rho=0.5, model=quantized, targets="frozen")
    resumed.load_state_dict(opt.state_dict())
    assert len(resumed.state_dict()["param_groups"][0]["nusam_outside"]) == 2
    assert opt.perturbation_numel() == 2 * (64 + 96)


def test_a_quantized_weight_without_the_model_is_refused():
    quantized, _ = with_4_bits(model())
    quantized[0].requires_grad_(False)
    with pytest.raises(ValueError, match="needs model= to reach the layers"):
        nusam.NuSAM(torch.optim.SGD(quantized[4].parameters(), lr=0.1), targets="frozen")


@pytest.mark.parametrize("kind", low_precision.KINDS)
def test_the_page_says_what_becomes_of_weights_of_few_bits(kind):
    assert low_precision.committed()[kind] == low_precision.cells(kind)  # else: python -m tests.low_precision


def test_the_page_lists_these_kinds_and_no_others():
    assert low_precision.committed().keys() == low_precision.KINDS.keys()


@pytest.mark.parametrize("method", [nusam.NuSAM, nusam.SAM])
def test_a_trained_weight_of_eight_bits_is_written_by_nobody(method):
    net = low_precision.converted("torchao `int8_weight_only_quantized_training`")
    before = copy.deepcopy(net.state_dict())
    options = {} if method is nusam.SAM else {"placement": "weights"}
    with pytest.raises(TypeError, match=r"keeps its entries in torch.int8, where no ε can be written; use nusam.NuSAM"):
        method(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1, model=net, **options)
    for name, value in net.state_dict().items():
        assert torch.equal(value.dequantize(), before[name].dequantize())


def _torchao(name):
    return lambda parameters: getattr(pytest.importorskip("torchao.optim"), name)(parameters, lr=1e-3)


def _bitsandbytes(name):
    def make(parameters):
        return getattr(pytest.importorskip("bitsandbytes").optim, name)(parameters, lr=1e-3, min_8bit_size=256)

    return make


FEW_BITS = {
    **{f"torchao {name}": _torchao(name) for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
    **{f"bitsandbytes {name}": _bitsandbytes(name) for name in ("AdamW8bit", "Lion8bit")},
}


@pytest.mark.parametrize("base", FEW_BITS)
def test_a_base_whose_state_has_few_bits_gets_the_gradient_at_the_perturbed_weights_and_resumes(base):
    def steps(net, opt, numbers):
        for step in numbers:
            x, y = low_precision.sample(step)
            for _ in opt.passes():
                nn.functional.cross_entropy(net(x), y).backward()
            torch.manual_seed(step)  # some round by chance
            opt.step()

    def made():
        net = low_precision.model()
        opt = nusam.NuSAM(FEW_BITS[base](list(net.parameters())), rho=0.3, model=net, power_iterations=100)
        return net, opt

    hand = low_precision.model()
    theirs = FEW_BITS[base](list(hand.parameters()))
    net, opt = made()
    steps(net, opt, [0])
    for p, q, expected in zip(net.parameters(), hand.parameters(), low_precision.descent_gradients(hand), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)
        q.grad = p.grad.clone()  # a sign may hang on the last digit
    torch.manual_seed(0)
    theirs.step()
    for p, q in zip(net.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

    steps(net, opt, [1, 2])
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict()), file)
    steps(net, opt, [3, 4])
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)
    other, resumed = made()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    steps(other, resumed, [3, 4])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
