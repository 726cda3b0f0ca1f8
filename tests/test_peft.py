"""νSAM on PEFT's LoRA: on the factors, and on the frozen base weights in their full space, dense and quantized."""

import copy
import hashlib
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nusam
from nusam.experiments.recipes.allocations import mark, moments
from nusam.reference import svd_top1

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*opaque value type"),
]
ROOT = Path(__file__).parents[1]
RHO, STEPS = 0.3, 5


def encoder(width=24, **shape):
    """A small BERT that draws no random numbers while it trains."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=width,
        intermediate_size=shape.pop("inner", 56),
        num_hidden_layers=shape.pop("depth", 2),
        num_attention_heads=2,
        vocab_size=60,
        max_position_embeddings=shape.pop("length", 16),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def adapted(model, targets="all-linear", r=3, started=True, **options):
    """The model under LoRA; its factors both away from zero, unless they are not to have started."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=r, target_modules=targets, lora_alpha=2 * r, **options)
    model = peft.get_peft_model(model, config)
    if started:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return model.train()


def loss_of(model, step=0, sentences=4, length=7):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 60, (sentences, length), generator=generator)
    return model(input_ids=tokens, labels=torch.randint(0, 3, (sentences,), generator=generator)).loss


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_matrices(model):
    """The weights under adapters, by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith(".base_layer.weight")}


def under_adapters(name, parameter):
    return ".base_layer." in name


def top_pair(G, u, iterations):
    """By power iteration, or for many iterations by the singular value decomposition."""
    if not G.any():
        return u, None
    if iterations < 100:
        return svd_top1(G / G.abs().max(), u, iterations)
    U, _, Vh = torch.linalg.svd(G)
    return U[:, 0], Vh[0]


def brute_force(model, base, names, us, iterations=1):
    """Write W + ρuvᵀ into the weights, with G by autograd, differentiate, write W back; losses of both passes."""
    matrices = {name: p for name, p in model.named_parameters() if name in names}
    frozen = [p for p in matrices.values() if not p.requires_grad]
    losses = []
    for step in range(STEPS):
        for parameter in frozen:
            parameter.requires_grad_(True)
        loss = loss_of(model, step)
        gradients = torch.autograd.grad(loss, list(matrices.values()))
        for parameter in frozen:
            parameter.requires_grad_(False)
        held = [p.detach().clone() for p in matrices.values()]
        for (name, p), G in zip(matrices.items(), gradients, strict=True):
            us[name], v = top_pair(G, us[name], iterations)
            if v is not None:
                p.data.add_(RHO * torch.outer(us[name], v))
        base.zero_grad()
        perturbed = loss_of(model, step)
        perturbed.backward()
        for p, w in zip(matrices.values(), held, strict=True):
            p.data.copy_(w)
        base.step()
        losses += [loss.item(), perturbed.item()]
    return losses


def ours(model, opt):
    losses = []
    for step in range(STEPS):
        for _ in opt.passes():
            loss = loss_of(model, step)
            loss.backward()
            losses.append(loss.item())
        opt.step()
    return losses


def warm_starts(opt):
    return {opt._names()[p]: state["u"].clone() for p, state in opt._states_to_save().items()}


def compare(model, targets, iterations, expected=None, tolerance=1e-9, named=None):
    """Five steps of ours and of the brute force, from the same warm starts."""
    expected = copy.deepcopy(model) if expected is None else expected
    base = torch.optim.AdamW(trained(model), lr=1e-2)
    opt = nusam.NuSAM(base, RHO, power_iterations=iterations, model=model, targets=targets, ascent="matrix-free")
    us = warm_starts(opt)
    names = set(us) if named is None else named
    losses = ours(model, opt)
    wanted = brute_force(expected, torch.optim.AdamW(trained(expected), lr=1e-2), names, us, iterations)
    assert losses == pytest.approx(wanted, rel=tolerance)
    rises = [b - a for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert min(rises) > 10 * tolerance * losses[0]
    by_name = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, by_name[name], rtol=0, atol=10 * tolerance, check_dtype=False)
    return opt


# ---------------------------------------------------------------- equal to writing ε into the weights


@pytest.mark.parametrize("iterations", [1, 300])
@pytest.mark.parametrize("adapters", ["all-linear", ["query", "value"]])
def test_full_space_equals_writing_the_perturbation_into_the_base_weights(adapters, iterations):
    model = adapted(encoder().double(), adapters)
    opt = compare(model, under_adapters, iterations)
    metrics = opt.metrics()
    assert {name for name in metrics if name.startswith("sigma/")} == {f"sigma/{n}" for n in base_matrices(model)}
    assert all(metrics[f"epsilon/{name}"] == pytest.approx(RHO) for name in base_matrices(model))
    assert not any(name.startswith("fallback") for name in metrics)


def test_all_frozen_matrices_are_reached_embeddings_too():
    model = adapted(encoder().double(), ["query", "value"])
    frozen = {n for n, p in model.named_parameters() if p.ndim == 2 and not p.requires_grad and "original" not in n}
    opt = compare(model, "frozen", 1, named=frozen)
    metrics = opt.metrics()
    assert {name.removeprefix("sigma/") for name in metrics if name.startswith("sigma/")} == frozen
    assert len(frozen) == 3 + 2 * 6 + 1  # embeddings, two layers, pooler
    assert not any(name.startswith("fallback") for name in metrics)


@pytest.mark.parametrize("started", [True, False])
def test_factors_equal_writing_the_perturbation_into_them(started):
    """With B = 0, as LoRA starts, the gradient of A is zero in the first step."""
    model = adapted(encoder().double(), started=started)
    opt = compare(model, "trainable", 1)
    names = {n for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2}
    metrics = opt.metrics()
    assert {name.removeprefix("sigma/") for name in metrics if name.startswith("sigma/")} == names
    assert sum("lora_A" in name for name in names) == sum("lora_B" in name for name in names) == 13
    assert not any(name.startswith("fallback") for name in metrics)


def test_gpt2s_transposed_layers_and_adapted_embeddings():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=60, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)
    ).train()
    tokens = torch.randint(0, 60, (2, 9))
    for targets, reached in ((under_adapters, 4), ("trainable", 2 * 4)):
        base = torch.optim.SGD(trained(model), lr=0.1)
        opt = nusam.NuSAM(base, RHO, model=model, targets=targets, ascent="matrix-free")
        for _ in opt.passes():
            model(input_ids=tokens, labels=tokens).loss.backward()
        opt.step()
        metrics = opt.metrics()
        told = {name.split(": ")[0].removeprefix("fallback/"): name for name in metrics if "fallback/" in name}
        sigma = {name.removeprefix("sigma/") for name in metrics if name.startswith("sigma/")}
        layers = {name for name in sigma if "lora_embedding" not in name and "wte" not in name}
        assert len(layers) == reached
        assert not layers & told.keys()
        # the embedding is tied to the head, and PEFT keeps its factors as plain parameters
        embedding = "wte.base_layer" if targets is under_adapters else "lora_embedding"
        assert told
        assert all(embedding in name for name in told)


# ---------------------------------------------------------------- quantized bases


def four_bit():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(
        quant_type=quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"]
    )


def entries(module):
    """The dense weight that a quantized layer stands for."""
    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if type(weight).__name__ == "Int8Params":
        return weight.data.float() * module.state.SCB[:, None] / 127
    return weight.dequantize()


def quantized(config, folder, width=64):
    """The encoder as transformers quantizes it on loading, and the same with the dense weights it stands for."""
    encoder(width, inner=128).save_pretrained(folder)
    kind = transformers.BertForSequenceClassification
    model = kind.from_pretrained(folder, quantization_config=config, device_map="cpu")
    model(torch.zeros(1, 2, dtype=torch.long))  # the first forward settles how they compute
    dense = kind.from_pretrained(folder)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and type(model.get_submodule(name).weight) is not nn.Parameter:
            with torch.no_grad():
                module.weight.copy_(entries(model.get_submodule(name)))
    return adapted(model, r=8), adapted(dense, r=8)


QUANTIZED = {"bitsandbytes 4-bit": four_bit, "bitsandbytes 8-bit": eight_bit, "torchao int8": torchao_int8}
quantized_bases = pytest.mark.parametrize("config", QUANTIZED.values(), ids=QUANTIZED)


def frozen_parts(model):
    """Every tensor that the frozen base consists of, by name."""
    parts = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if type(parameter).__name__ == "Params4bit":
                found = [parameter.data, parameter.quant_state.absmax, parameter.quant_state.code]
            elif type(parameter).__name__ == "Int8Params":
                found = [parameter.data, module.state.SCB]
            else:
                found = [parameter.qdata, parameter.scale] if hasattr(parameter, "qdata") else [parameter]
            if not parameter.requires_grad:
                parts |= {f"{name}.{key} {i}": part.detach() for i, part in enumerate(found)}
    return parts


def checksums(parts):
    return {
        name: hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, part in parts.items()
    }


@quantized_bases
def test_a_quantized_base_is_perturbed_as_the_dense_weights_it_stands_for(config, tmp_path):
    model, dense = quantized(config(), tmp_path)
    opt = compare(model, under_adapters, 1, expected=dense, tolerance=1e-4)
    names = base_matrices(model)
    assert len(names) == 2 * 6 + 1
    metrics = opt.metrics()
    assert {name for name in metrics if name.startswith("sigma/")} == {f"sigma/{name}" for name in names}
    assert not any(name.startswith("fallback") for name in metrics)


@quantized_bases
def test_no_bit_of_a_quantized_base_is_written_and_no_gradient_of_it_kept(config, tmp_path):
    model, _ = quantized(config(), tmp_path)
    parts = frozen_parts(model)
    before = checksums(parts)
    assert len(before) > 40 + 13  # a scale of each quantized matrix
    places = {name: part.data_ptr() for name, part in parts.items()}
    opt = nusam.NuSAM(torch.optim.AdamW(trained(model), lr=1e-2), RHO, model=model, targets="frozen")
    for step in range(3):
        for name in opt.passes():
            loss_of(model, step).backward()
            assert checksums(parts) == before, name
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        opt.step()
    assert checksums(parts) == before
    assert {name: part.data_ptr() for name, part in frozen_parts(model).items()} == places
    assert sum(name.startswith("sigma/") for name in opt.metrics()) == 3 + 2 * 6 + 1


def test_no_gradient_of_a_base_weight_is_formed():
    class Shapes(TorchDispatchMode):
        def __init__(self, model):
            super().__init__()
            self.seen = set()
            self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(out)
            made = [t for t in leaves if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.own]
            self.seen |= {tuple(t.shape) for t in made} | {tuple(t.shape)[::-1] for t in made}
            return out

    model = adapted(encoder())
    shapes_of_base = {tuple(p.shape) for p in base_matrices(model).values()}
    assert shapes_of_base == {(24, 24), (56, 24), (24, 56)}
    opt = nusam.NuSAM(torch.optim.SGD(trained(model), lr=0.1), RHO, model=model, targets="frozen")
    for _ in opt.passes():  # the step in which layers are compared with gradients, one at a time
        loss_of(model).backward()
    assert all(p.grad is None for p in base_matrices(model).values())
    for name in opt.passes():
        loss = loss_of(model)
        with Shapes(model) as shapes:
            loss.backward()
        assert not shapes_of_base & shapes.seen
        assert ((3, 24) in shapes.seen) == (name == "descent")  # a factor's, where it is needed
    opt.step()
    for parameter in base_matrices(model).values():  # and it would have been seen
        parameter.requires_grad_(True)
    loss = loss_of(model)
    with Shapes(model) as shapes:
        loss.backward()
    assert shapes_of_base <= shapes.seen


# ---------------------------------------------------------------- memory


def peak_bytes(build, wrap):
    """Peak of the second step, counted by the allocator."""

    def program():
        model = build()
        opt = wrap(torch.optim.AdamW(trained(model), lr=1e-3), model)
        for step in range(2):
            mark("second" if step else "first")
            for _ in opt.passes() if isinstance(opt, nusam.SharpnessAware) else range(1):
                loss_of(model, step, sentences=8, length=64).backward()
            opt.step()
            opt.zero_grad()

    seen = moments(program)
    return max(moment.live for moment in seen[[moment.mark for moment in seen].index("second") :])


@pytest.mark.parametrize("adapters", ["all-linear", ["query", "value"]])
def test_memory_is_that_of_plain_lora(adapters):
    def build():
        return adapted(encoder(128, inner=512, depth=3, length=64), adapters, r=8)

    plain = peak_bytes(build, lambda base, model: base)
    options = {"ascent": "matrix-free"}
    ratios = {
        "factors": peak_bytes(build, lambda base, model: nusam.NuSAM(base, model=model, **options)) / plain,
        "under adapters": peak_bytes(build, lambda b, m: nusam.NuSAM(b, model=m, targets=under_adapters)) / plain,
        "gradient of the base": peak_bytes(lambda: build().requires_grad_(True), lambda b, m: b) / plain,
    }
    assert 1 <= ratios["factors"] <= 1.02
    assert 1 <= ratios["under adapters"] <= 1.02
    assert ratios["gradient of the base"] > 1.1  # what is saved


# ---------------------------------------------------------------- with PEFT's own tools


def test_saving_merging_and_switching_off_adapters():
    model = adapted(encoder())
    opt = nusam.NuSAM(torch.optim.SGD(trained(model), lr=0.1), RHO, model=model, targets="frozen")
    opt_step(model, opt)
    x = torch.randint(0, 60, (2, 5))
    model.eval()
    with torch.no_grad():
        alone = encoder().eval()(x).logits
        with model.disable_adapter():
            base = model.base_model.model.bert(x)[1]
        torch.testing.assert_close(base, encoder().eval().bert(x)[1], rtol=0, atol=0)
        before = model(x).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x).logits, before, rtol=1e-4, atol=1e-5)
    assert (before - alone).abs().max() > 1e-3


def opt_step(model, opt, step=0):
    for _ in opt.passes():
        loss_of(model, step).backward()
    opt.step()


def test_saving_an_adapter_in_the_descent_is_refused(tmp_path):
    model = adapted(encoder())
    opt = nusam.NuSAM(torch.optim.SGD(trained(model), lr=0.1), RHO, model=model, targets="frozen")
    for name in opt.passes():
        loss_of(model).backward()
        if name == "descent":
            with pytest.raises(RuntimeError, match="descent"):
                model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("targets", ["trainable", "frozen"])
def test_resuming_is_bit_exact(targets, tmp_path):
    def start():
        model = adapted(encoder())
        base = torch.optim.AdamW(trained(model), lr=1e-2)
        return model, nusam.NuSAM(base, RHO, model=model, targets=targets)

    model, opt = start()
    for step in range(6):
        if step == 3:
            torch.save(
                {"adapter": peft.get_peft_model_state_dict(model), "opt": opt.state_dict()}, tmp_path / "last.pt"
            )
        opt_step(model, opt, step)
    again, resumed = start()
    saved = torch.load(tmp_path / "last.pt")
    peft.set_peft_model_state_dict(again, saved["adapter"])
    resumed.load_state_dict(saved["opt"])
    for step in range(3, 6):
        opt_step(again, resumed, step)
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)


# ---------------------------------------------------------------- the example


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["factors"], ["full", "--bits", "4"]], ids=" ".join)
def test_the_example_trains_a_pretrained_encoder_on_real_sentences(arguments, monkeypatch, capsys):
    folders = {name: os.environ.get(name) for name in ("NUSAM_ENCODERS", "NUSAM_SENTENCES")}
    missing = [name for name, folder in folders.items() if not folder]
    if missing:
        pytest.skip(f"{' and '.join(missing)} name no folder with all-MiniLM-L6-v2 or the movie reviews")
    command = ["lora.py", "--sentences", folders["NUSAM_SENTENCES"], "--train", "100", "--test", "20"]
    command += ["--encoder", str(Path(folders["NUSAM_ENCODERS"]) / "all-MiniLM-L6-v2")]
    command += ["--epochs", "5", "--lr", "3e-3", "--rho", "0.001", "--method", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "examples" / "lora.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5
    assert losses[-1] < 0.92 * losses[0]
