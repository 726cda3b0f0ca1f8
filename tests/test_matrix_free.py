"""Matrix-free ascent gives the gradient ascent's u and v, forms no weight gradient, and leaves the model alone."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nusam
from tests.conftest import loss_of, mlp

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def learn(opt, model, loss):
    """Take the step in which the layers are compared with the gradients, and go back to the warm starts."""
    before = {parameter: dict(state) for parameter, state in opt._states.items()}
    for _ in opt.passes():
        loss(model).backward()
    model.zero_grad(set_to_none=True)
    opt._ascent.states = before


def ascend(model, loss, ascent, start=None, **options):
    """u, ε's v and metrics after one ascent from the same warm starts, by name, and the descent's gradients."""
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.01, model=model, ascent=ascent, **options)
    if start is not None:
        opt.load_state_dict(start)
    if ascent == "matrix-free":
        learn(opt, model, loss)
    torch.manual_seed(11)
    found = {}
    for name in opt.passes():
        loss(model).backward()
        if name == "descent":
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    names = {p: n for n, p in model.named_parameters()}
    us = {names[p]: state["u"] for p, state in opt._states.items()}
    return us, found, opt.metrics(), opt


def matrix_free(model, lr, **options):
    return nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=lr), model=model, ascent="matrix-free", **options)


def assert_same_ascent(model, loss, served=None, fallbacks=(), **options):
    """Both ascents agree, on two steps: from the first warm start, and from the second."""
    dtype = next(model.parameters()).dtype
    start = None
    for _ in range(2):
        wanted, gradients, wanted_metrics, reference = ascend(copy.deepcopy(model), loss, "gradient", start, **options)
        us, free_gradients, metrics, opt = ascend(model, loss, "matrix-free", start, **options)
        assert us.keys() == wanted.keys()
        for name, u in us.items():
            assert torch.linalg.vector_norm(u - wanted[name]) <= TOLERANCE[dtype], name
        scale = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in free_gradients.items():  # v is inside ε, and ε inside the descent's gradient
            assert (gradient - gradients[name]).abs().max() <= TOLERANCE[dtype] * scale, name
        told = {k.removeprefix("fallback/").split(":")[0] for k in metrics if k.startswith("fallback/")}
        assert told == set(fallbacks)
        for key, value in wanted_metrics.items():
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key
        if served is not None:
            assert us.keys() - told == set(served)
        start = reference.state_dict()
        model.zero_grad(set_to_none=True)
    return opt


# ------------------------------------------------------------------ kinds of layers


class Mixing(nn.Module):
    """A Mixer's token mixing: the linear layer sees a transposed, non-contiguous input."""

    def __init__(self):
        super().__init__()
        self.tokens, self.channels = nn.Linear(5, 5), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return self.channels(self.tokens(x.mT).mT).relu_()  # in place, as many activations are


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class CrossAttention(Attention):
    def forward(self, x):
        return self.attention(x, x.flip(1), x.flip(1))[0]


class SeparateAttention(Attention):
    """Another key dimension makes query, key and value weights parameters of their own."""

    def __init__(self):
        super().__init__(kdim=5, vdim=6)

    def forward(self, x):
        return self.attention(x, x[..., :5], x)[0]


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6, **options), nn.Linear(6, 6)

    def forward(self, x):
        index = (x[..., 0] * 3).long().abs() % 7
        return self.head(self.table(index))


class Repeated(nn.Module):
    """One module called as often as it is told."""

    def __init__(self, times=2):
        super().__init__()
        self.layer, self.head, self.times = nn.Linear(6, 6), nn.Linear(6, 6), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return self.head(x)


class Tied(nn.Module):
    """Embedding and head share their matrix, as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.middle(self.table((x[..., 0] * 3).long().abs() % 7)).tanh())


class Experts(nn.Module):
    """The second expert gets no row at all, the third is never called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        rows = x.reshape(-1, 6)
        return torch.cat([self.experts[0](rows), self.experts[1](rows[:0])])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.block, self.dropout = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.3)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.first(x)
        return checkpoint(lambda h: self.dropout(self.block(h)).tanh(), h, use_reentrant=self.reentrant)


class Direct(nn.Module):
    """Uses its table's matrix without the layer."""

    def __init__(self):
        super().__init__()
        self.table, self.middle = nn.Embedding(7, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.middle(self.table((x[..., 0] * 3).long().abs() % 7)) @ self.table.weight.mT


KINDS = {
    "linear": (lambda: nn.Linear(6, 4), ["weight"], []),
    "mixing": (Mixing, ["tokens.weight", "channels.weight"], []),
    "attention": (Attention, ["attention.in_proj_weight", "attention.out_proj.weight"], []),
    "attention-separate": (
        SeparateAttention,
        [f"attention.{p}_proj_weight" for p in "qkv"] + ["attention.out_proj.weight"],
        [],
    ),
    "cross-attention": (CrossAttention, None, None),
    "embedding": (Table, ["table.weight", "head.weight"], []),
    "embedding-padding": (lambda: Table(padding_idx=0), ["table.weight", "head.weight"], []),
    "embedding-frequency": (lambda: Table(scale_grad_by_freq=True), ["head.weight"], ["table.weight"]),
    "two-calls": (Repeated, ["head.weight"], ["layer.weight"]),
    "one-call": (lambda: Repeated(1), ["layer.weight", "head.weight"], []),
    "tied": (Tied, ["middle.weight"], ["table.weight"]),
    "experts": (Experts, None, []),
    "checkpoint": (lambda: Checkpointed(False), ["first.weight", "block.weight"], []),
    "checkpoint-reentrant": (lambda: Checkpointed(True), ["first.weight", "block.weight"], []),
    "norm-and-conv": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(2), nn.Linear(20, 3)
        ),
        ["4.weight"],
        [],
    ),
}


def square_loss(seed=0, batch=3):
    def loss(model):
        generator = torch.Generator().manual_seed(seed)
        dtype = next(model.parameters()).dtype
        x = torch.randn(batch, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
        return (model(x) - 0.3).square().mean()

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("placement", ["weights", "forward"])
def test_every_kind_of_layer_agrees_with_its_gradient(kind, dtype, placement):
    build, served, fallbacks = KINDS[kind]
    model = build().to(dtype)
    if placement == "forward" and kind == "embedding-frequency":
        pytest.skip("its table is no layer that ε could live in")
    if fallbacks is None:  # query is not key: pieces of the matrix are multiplied
        for kept in ("weights", "forward"):
            assert_same_ascent(model, square_loss(), fallbacks=["attention.in_proj_weight"], placement=kept)
        return
    if kind == "experts":
        loss = square_loss()
        wanted = ascend(copy.deepcopy(model), loss, "gradient", placement=placement)
        actual = ascend(model, loss, "matrix-free", placement=placement)
        for name in ("experts.0.weight", "experts.1.weight"):
            assert torch.linalg.vector_norm(actual[0][name] - wanted[0][name]) <= TOLERANCE[dtype]
        assert "epsilon/experts.2.weight" not in actual[2]
        return
    assert_same_ascent(model, square_loss(), served, fallbacks, placement=placement)


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 4])
def test_more_iterations_and_batches_of_one(iterations, batch):
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()
    assert_same_ascent(model, square_loss(batch=batch), power_iterations=iterations)


def test_nusam_norm_shares_the_radius_among_served_and_unserved_matrices():
    model = Tied().double()
    results = []
    for ascent in ("gradient", "matrix-free"):
        clone = copy.deepcopy(model)
        opt = nusam.NuSAMNorm(torch.optim.SGD(clone.parameters(), lr=0.0), model=clone, ascent=ascent)
        for _ in opt.passes():
            square_loss()(clone).backward()
        results.append({k: v for k, v in opt.metrics().items() if not k.startswith("fallback/")})
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_a_module_called_a_varying_number_of_times():
    model = Repeated().double()
    for times in (1, 3, 1, 2):
        model.times = times
        assert_same_ascent(model, square_loss(), fallbacks=["layer.weight"] if times > 1 else [])


def test_a_matrix_used_outside_its_layer_is_noticed_and_served_by_its_gradient_from_then_on():
    model = Direct().double()
    opt = matrix_free(model, 0.0)
    reference_model = copy.deepcopy(model)
    reference = nusam.NuSAM(
        torch.optim.SGD(reference_model.parameters(), lr=0.0), model=reference_model, ascent="gradient"
    )
    for _step in range(3):
        for m, o in ((model, opt), (reference_model, reference)):
            for _ in o.passes():
                square_loss()(m).backward()
        metrics = opt.metrics()
        assert metrics["fallback/table.weight: also used outside its layer"] == 1.0
        assert metrics["epsilon/table.weight"] == pytest.approx(0.05)
        for p, q in zip(opt._states, reference._states, strict=True):
            assert torch.linalg.vector_norm(opt._states[p]["u"] - reference._states[q]["u"]) <= 1e-12


def test_a_matrix_used_outside_its_layer_cannot_have_its_epsilon_in_the_forward():
    model = Direct()
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.0), model=model, ascent="matrix-free", placement="forward"
    )
    with pytest.raises(RuntimeError, match=r"table.weight is also used outside its layer.*placement='weights'"):
        for _ in opt.passes():
            square_loss()(model).backward()


@pytest.mark.parametrize("first", [0, 3])
def test_two_backwards_in_one_ascent_give_the_sum_of_their_gradients(first):
    """From the first step on, and in a loop that begins with it after its layers have been compared."""
    models = [nn.Linear(6, 3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [
        nusam.NuSAM(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.3, model=m, ascent=ascent)
        for m, ascent in zip(models, ("matrix-free", "gradient"), strict=True)
    ]
    for step in range(6):
        for model, opt in zip(models, opts, strict=True):
            for _ in opt.passes():
                square_loss(step)(model).backward()
                if step >= first:
                    square_loss(step + 9)(model).backward()
            opt.step()
        assert opts[0].metrics()["epsilon/weight"] == pytest.approx(0.3)
        torch.testing.assert_close(models[0].weight, models[1].weight, rtol=0, atol=1e-12)
    assert opts[0].metrics()["fallback/weight: used 2 times"] == 1.0


modules = st.recursive(
    st.sampled_from(["linear", "mixing", "attention", "repeated", "checkpoint", "norm"]),
    lambda children: st.lists(children, min_size=1, max_size=3),
    max_leaves=5,
)


def build(tree):
    if isinstance(tree, list):
        return nn.Sequential(*map(build, tree))
    return {
        "linear": lambda: nn.Sequential(nn.Linear(6, 11), nn.ReLU(inplace=True), nn.Linear(11, 6)),
        "mixing": Mixing,
        "attention": Attention,
        "repeated": Repeated,
        "checkpoint": lambda: Checkpointed(False),
        "norm": lambda: nn.LayerNorm(6),
    }[tree]()


@settings(max_examples=40)
@given(tree=modules, seed=st.integers(0, 1000), batch=st.integers(1, 4))
def test_random_module_trees(tree, seed, batch):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), build(tree)).double()
    wanted = ascend(copy.deepcopy(model), square_loss(seed, batch), "gradient")
    actual = ascend(model, square_loss(seed, batch), "matrix-free")
    assert actual[0].keys() == wanted[0].keys()
    for name, u in actual[0].items():
        # a near-dead ReLU network can have σ₁ ≈ σ₂ ≈ 0; where the gradient is alive, u agrees
        if wanted[2].get(f"sigma/{name}", 0) > 1e-12:
            assert torch.linalg.vector_norm(u - wanted[0][name]) <= 1e-9, name


# ------------------------------------------------------------------ real models


def cross_entropy(*shape, vocabulary=None):
    def loss(model):
        generator = torch.Generator().manual_seed(3)
        if vocabulary:
            x = torch.randint(0, vocabulary, shape, generator=generator)
            logits = model(input_ids=x)
            logits = logits.logits if hasattr(logits, "logits") else logits.last_hidden_state
        else:
            x = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
            logits = model(x)
        logits = logits.reshape(-1, logits.shape[-1])
        return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])

    return loss


@pytest.mark.parametrize("name", ["vit", "mixer", "deit", "convnext"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_timm_models(name, dtype):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = {
        "vit": lambda: timm.models.VisionTransformer(**vit),
        "mixer": lambda: timm.models.MlpMixer(
            num_classes=5, img_size=16, patch_size=4, num_blocks=2, embed_dim=24, nlhb=True
        ),
        "deit": lambda: timm.models.deit.VisionTransformerDistilled(**vit),
        "convnext": lambda: timm.models.ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2),
    }[name]().to(dtype)
    for p in model.parameters():  # layer scales and heads that start at zero would hide everything behind them
        if p.abs().max() < 1e-3:
            nn.init.normal_(p, std=0.3)
    image = (2, 3, 32, 32) if name == "convnext" else (2, 3, 16, 16)
    opt = assert_same_ascent(model, cross_entropy(*image), fallbacks=[])
    if name == "convnext":
        assert not any(p.ndim != 2 for p in opt._states)  # 1×1 convolutions stay out


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_transformers_models(name, dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.BertModel(config, add_pooling_layer=False)
    elif name == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=2)
        )
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=31,
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
            )
        )
    fallbacks = ["transformer.wte.weight"] if name == "gpt2" else []
    assert_same_ascent(model.to(dtype), cross_entropy(3, 12, vocabulary=31), fallbacks=fallbacks)


# ------------------------------------------------------------------ precision, scaling, compilation


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(dtype, backward_inside):
    """As close to the gradient ascent as that is to its own float32 result."""
    model, results = small(), {}

    def loss(model):
        with torch.autocast("cpu", dtype):
            return (model(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))) - 1).square().mean()

    for ascent in ("gradient", "matrix-free"):
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model, ascent=ascent)
        for _ in opt.passes():
            if backward_inside:
                with torch.autocast("cpu", dtype):
                    loss(model).backward()
            else:
                loss(model).backward()
        results[ascent] = [opt._states[p]["u"] for p in model.parameters() if p.ndim == 2]
    for a, b in zip(*results.values(), strict=True):
        assert a.dtype == torch.float32
        assert torch.linalg.vector_norm(a - b) < 0.05


@pytest.mark.parametrize("overflow", [None, "ascent", "descent"])
def test_a_stock_grad_scaler(overflow):
    model = small()
    opt = matrix_free(model, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(2):
        u = [state["u"].clone() for state in opt._states.values()]
        before = [p.detach().clone() for p in model.parameters()]
        for name in opt.passes():
            with torch.autocast("cpu", torch.float16):
                loss = square_loss()(model)
            scaler.scale(loss * (1e30 if name == overflow else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
    changed = (model[0].weight - before[0]).abs().max() > 1e-6
    assert changed == (overflow != "descent")
    kept = all(torch.equal(a, b["u"]) for a, b in zip(u, opt._states.values(), strict=True))
    assert kept == (overflow == "ascent")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "attention", "embedding", "checkpoint", "tied", "two-calls"])
@pytest.mark.parametrize("placement", ["weights", "forward"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_has_no_graph_break_and_one_graph_a_kind_of_pass(kind, placement):
    torch._dynamo.reset()
    build, _, _ = KINDS[kind]
    model = build().double()
    eager = copy.deepcopy(model)
    from torch._dynamo.testing import CompileCounterWithBackend

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent="matrix-free", placement=placement
    )
    eager_opt = nusam.NuSAM(
        torch.optim.SGD(eager.parameters(), lr=0.1), model=eager, placement=placement, ascent="gradient"
    )
    for step in range(5):
        torch.manual_seed(step)
        for _ in opt.passes():
            square_loss(step)(compiled).backward()
        opt.step()
        torch.manual_seed(step)
        for _ in eager_opt.passes():
            square_loss(step)(eager).backward()
        eager_opt.step()
        if kind == "two-calls":  # a graph counts its uses on the device
            assert opt.metrics()["fallback/layer.weight: used repeatedly in a graph"] == 1.0
            assert opt.metrics()["epsilon/layer.weight"] == pytest.approx(0.05)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    # an ascent that compares, one that serves, and the descent
    assert graphs.frame_count == 3, graphs.graphs


# ------------------------------------------------------------------ what is not formed, not read, not left behind


@pytest.mark.parametrize("how", ["halves", "accumulated"])
def test_a_loop_that_changes_gradients_midway_and_can_not_start_over_is_told(how):
    model = nn.Sequential(nn.Linear(6, 37), nn.ReLU(), nn.Linear(37, 2))
    opt = matrix_free(model, 0.1)
    learn(opt, model, square_loss())

    def one(factor):
        square_loss()(model).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= factor

    def step(factor):
        if how == "accumulated":
            for _ in opt.passes(accumulate=True):
                one(factor)
        else:
            with opt.ascent():
                one(factor)
            with opt.descent():
                one(factor)
        opt.step()

    opt.zero_grad()
    with pytest.warns(UserWarning, match="0.weight, 2.weight has its gradient changed by the loop inside the passes"):
        step(0.5)
    assert not any(key.startswith("fallback") for key in opt.metrics())
    step(0.5)  # by gradients, and nothing is left to be said
    reasons = {key.split(": ")[1] for key in opt.metrics() if key.startswith("fallback")}
    assert reasons == {"changed by the loop in the passes"}


@pytest.mark.parametrize("what", ["0.weight", "0.bias", "1.weight"])
def test_a_loop_that_looks_at_gradients_from_the_first_step_on_has_them(what):
    """Of a matrix, of a bias beside one, and of a norm."""
    model = nn.Sequential(nn.Linear(6, 37), nn.LayerNorm(37), nn.Linear(37, 2))
    opt = matrix_free(model, 0.1)
    for _ in range(7):
        for _ in opt.passes():
            square_loss()(model).backward()
            model.get_parameter(what).grad.clamp_(-1e9, 1e9)
        opt.step()
    reasons = {key.split(": ")[1] for key in opt.metrics() if key.startswith("fallback")}
    assert reasons == {"looked at by the loop in the passes"}


def test_a_norm_that_thaws_midway_may_be_asked_for_its_gradient():
    """Seen where it is compared next, so that its layer is not idle any more."""
    model = nn.Sequential(nn.Linear(6, 37), nn.LayerNorm(37), nn.Linear(37, 2))
    norm = model[1].requires_grad_(False)
    opt = matrix_free(model, 0.1)
    for step in range(4):
        norm.requires_grad_(step > 0)
        for _ in opt.passes():
            loss = square_loss()(model)
            if step > 1:
                loss = loss + torch.autograd.grad(loss, norm.weight, create_graph=True)[0].square().sum()
            loss.backward()
        opt.step()


def test_a_loop_that_only_looks_for_gradients_midway_is_served():
    model = nn.Sequential(nn.Linear(6, 37), nn.ReLU(), nn.Linear(37, 2))
    opt = matrix_free(model, 0.1)
    for step in range(6):
        passes, norms = [], []
        for name in opt.passes():
            passes.append(name)
            square_loss()(model).backward()
            if step in (1, 3, 5):  # where nothing is compared
                norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        assert passes == ["ascent", "descent"]
        assert len(norms) == 4 * (step % 2)
        opt.step()
    assert not any(key.startswith("fallback") for key in opt.metrics())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def written_through_data(p, attack):
    before = p.data.clone()
    p.data.add_(attack)
    return lambda: setattr(p, "data", before)


def written_without_gradients(p, attack):
    before = p.detach().clone()
    with torch.no_grad():
        p.add_(attack)

    def undo():
        with torch.no_grad():
            p.copy_(before)

    return undo


@pytest.mark.parametrize("begins", [2, 3, 5])
@pytest.mark.parametrize("chosen", [("0.",), ("2.weight",), ("0.", "1."), ("",)])
@pytest.mark.parametrize("write", [written_through_data, written_without_gradients])
def test_adversarial_training_that_asks_whether_there_is_a_gradient_may_begin_at_any_time(begins, chosen, write):
    """Where the ascent has none it makes no second backward, and the descent does."""
    ids = torch.randint(0, 10, (6, 4), generator=torch.Generator().manual_seed(0))

    def run(model, attacks):
        (model(ids) - 1.5).square().mean().backward()
        undos = []
        for name, p in model.named_parameters() if attacks else ():
            if name.startswith(chosen) and p.grad is not None:
                undos.append(write(p, 0.2 * p.grad / (p.grad.norm() + 1e-9)))
        if undos:
            (model(ids) - 1.5).square().mean().backward()
        for undo in undos:
            undo()

    model = nn.Sequential(nn.Embedding(10, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    plain = copy.deepcopy(model.double())
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2, model=model, ascent="matrix-free", power_iterations=200
    )
    for step in range(begins + 3):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The model writes .* or the loop does between backwards")
            for _ in opt.passes():
                run(model, step >= begins)
        opt.step()
        base.zero_grad()
        run(plain, step >= begins)
        before = [p.detach().clone() for p in plain.parameters()]
        for p in plain.parameters():
            if p.ndim == 2:
                U, _, Vh = torch.linalg.svd(p.grad)
                p.data += 0.2 * torch.outer(U[:, 0], Vh[0])
        base.zero_grad()
        run(plain, step >= begins)
        for p, old in zip(plain.parameters(), before, strict=True):
            p.data = old
        base.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


def test_no_gradient_of_a_weight_bias_or_norm_is_formed_in_the_ascent():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            self.seen += [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor) and not t._is_view()]
            return out

    model = nn.Sequential(nn.Linear(6, 37), nn.LayerNorm(37), nn.ReLU(), nn.Linear(37, 11), nn.Linear(11, 2))
    opt = matrix_free(model, 0.1)
    learn(opt, model, square_loss())
    matrices = {(37, 6), (11, 37), (2, 11)}
    for name in opt.passes():
        loss = square_loss()(model)
        with Shapes() as shapes:
            loss.backward()
        formed = matrices & {s for shape in shapes.seen for s in (shape, shape[::-1])}
        if name == "ascent":
            assert not formed
            assert all(p.grad is None for p in model.parameters())
        else:
            assert formed == matrices
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("placement", ["weights", "forward"])
def test_no_value_is_read_on_the_host(placement):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # the marker of an addition to the weights is a float of the host's own
            if "_local_scalar_dense" in str(func):
                self.reads += 1
            return func(*args, **(kwargs or {}))

    model = small()
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent="matrix-free", placement=placement
    )
    with Reads() as mode:
        for _ in range(3):
            for _ in opt.passes():
                square_loss()(model).backward()
            opt.step()
    # placement="weights" asks its own marker once or twice a step, which lives on the CPU
    assert mode.reads <= (0 if placement == "forward" else 6)


def test_the_model_is_as_it_was_found():
    model = small()
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent="matrix-free", placement="forward"
    )
    before = [dict(vars(module)) for module in model.modules()]
    keys, blob = list(model.state_dict()), len(pickle.dumps(model))
    for name in opt.passes():
        assert "forward" in vars(model[0])
        square_loss()(model).backward()
        if name == "ascent":
            with pytest.raises(Exception, match="inside the ascent pass"):
                opt.detach()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert "forward" not in vars(module)
    assert list(model.state_dict()) == keys
    for p in model.parameters():
        assert p.requires_grad
        assert not p._backward_hooks
        p.grad = None
    assert len(pickle.dumps(model)) == blob
    copy.deepcopy(model)(torch.randn(2, 6))
    del opt
    gc.collect()
    assert all(vars(m).keys() == a.keys() for m, a in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_an_exception_leaves_the_model_as_it_was_found(where):
    model = small()
    opt = nusam.NuSAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, ascent="matrix-free", placement="forward"
    )

    def run():
        for name in opt.passes():
            if name == where:
                raise KeyboardInterrupt
            square_loss()(model).backward()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_detach_goes_back_to_gradients_for_good():
    model = small()
    opt = matrix_free(model, 0.1)
    opt.detach()
    for name in opt.passes():
        assert "forward" not in vars(model[0])
        square_loss()(model).backward()
        assert model[0].weight.grad is not None
        model.state_dict()  # nothing guards it any more
        del name
    opt.step()


def test_a_module_whose_forward_was_replaced_already_falls_back():
    model = small()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 2
    opt = matrix_free(model, 0.1)
    for _ in opt.passes():
        square_loss()(model).backward()
    assert opt.metrics()["fallback/0.weight: no known layer holds it"] == 1.0
    assert opt.metrics()["epsilon/0.weight"] == pytest.approx(0.05)


@pytest.mark.parametrize("ascent", ["gradient", "matrix-free"])
def test_autocast_around_both_passes_leaves_the_power_iteration_alone(ascent):
    inside, around = mlp(), mlp()
    around.load_state_dict(inside.state_dict())
    opts = [
        nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1, model=model, ascent=ascent)
        for model in (inside, around)
    ]
    for _ in opts[0].passes():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(inside)
        loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in opts[1].passes():
            loss_of(around).backward()
    metrics = [opt.metrics() for opt in opts]
    assert metrics[0]["epsilon/0.weight"] == pytest.approx(0.1, rel=1e-6)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)


def test_frozen_targets_need_a_matrix_free_ascent():
    model = mlp()
    model[0].requires_grad_(False)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="frozen weights have no gradient"):
        nusam.NuSAM(base, model=model, targets="frozen", ascent="gradient")


class Still(torch.optim.Optimizer):
    """Moves nothing, whatever dtype gradients have."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="needs torch.Tensor.grad_dtype")
@pytest.mark.parametrize("options", [{}, {"ascent": "matrix-free"}, {"ascent": "gradient"}])
@pytest.mark.parametrize("changes", [0, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_may_have_another_dtype_than_their_weights(options, changes, twice):
    """From the first step on or later, in matrices that are served and in those that are not."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)).to(torch.bfloat16)
        opt = nusam.NuSAM(Still(model.parameters()), rho=0.3, model=model, **options)
        x = torch.randn(8, 6).to(torch.bfloat16)
        for step in range(5):
            if step == changes:
                for parameter in model.parameters():
                    parameter.grad = None
                    parameter.grad_dtype = dtype
            for _ in opt.passes():
                y = model(x) + model(2 * x) if twice else model(x)
                (y.float() - 1).square().mean().backward()
            opt.step()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
        found.append([parameter.grad.float() for parameter in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)
