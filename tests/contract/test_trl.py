"""TRL's trainers behind the mixin: the steps of a loop by hand with exact pairs, and one batch in both passes."""

import string
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState

import nusam
from nusam.integrations.accelerate import sharpness_aware
from nusam.integrations.transformers import NuSAMTrainerMixin
from tests.contract.test_trainer_state import history

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # TRL's, of what changes in its next version
]
RHO, STEPS = 0.3, 5
PAIRS = list(zip(string.ascii_lowercase, string.ascii_lowercase[5:], strict=False))
LETTERS = {c: i for i, c in enumerate(["<pad>", "<eos>", "<unk>", *string.ascii_lowercase])}


def tokenizer():
    words = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def language_model(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    sizes = {"vocab_size": len(LETTERS), "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, **ends, **options)).double()


def common(folder, **options):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    } | options


def plainly(folder, **options):
    """SGD at a constant rate."""
    steps = {"learning_rate": 0.2, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    return common(folder, **steps, gradient_checkpointing=options.pop("gradient_checkpointing", False), **options)


def texts():
    return Dataset.from_list([{"text": a + b + b + a} for a, b in PAIRS])


def preferences():
    return Dataset.from_list([{"prompt": a, "chosen": b + a, "rejected": a + b} for a, b in PAIRS])


def adapters():
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def fine_tuning(folder, **options):
    model = language_model(**options.pop("model", {}))
    return trl.SFTTrainer, {
        "model": model,
        "args": trl.SFTConfig(**plainly(folder, **options)),
        "train_dataset": texts(),
        "processing_class": tokenizer(),
    }


def preferring(folder, reference=None, lora=False, **options):
    return trl.DPOTrainer, {
        "model": language_model(),
        "ref_model": reference,
        "args": trl.DPOConfig(**plainly(folder, **options)),
        "train_dataset": preferences(),
        "processing_class": tokenizer(),
        "peft_config": adapters() if lora else None,
    }


TRAININGS = {
    "SFT": fine_tuning,
    "SFT, packed": partial(fine_tuning, packing=True, max_length=12, packing_strategy="wrapped"),
    "SFT, tied head": partial(fine_tuning, model={"tie_word_embeddings": True}),
    "SFT, accumulation": partial(fine_tuning, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "SFT, checkpoints": partial(fine_tuning, gradient_checkpointing=True),
    "DPO, a reference of its own": lambda folder: preferring(folder, language_model(1)),
    "DPO, LoRA": partial(preferring, lora=True),
}
WAYS = {
    "default": {},
    "gradient": {"ascent": "gradient"},
    "matrix-free": {"ascent": "matrix-free"},
    "forward": {"ascent": "matrix-free", "placement": "forward"},
}


HEADS = ("lm_head.weight", "embed_tokens.weight")  # TRL's losses take the former, or what it is tied to, in pieces


def but_heads(name, parameter):
    return parameter.requires_grad and not name.endswith(HEADS)


class ByHand:
    """A step in two calls of the trainer's own: weights are copied, moved by exact pairs, and copied back."""

    perturbs = staticmethod(lambda name, parameter: True)

    def training_step(self, model, inputs, *args, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        trained = [p for _, p in named]
        kept, state = [p.grad for p in trained], torch.get_rng_state()
        for p in trained:
            p.grad = None
        loss = super().training_step(model, inputs, *args, **kwargs)
        before = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for name, p in named:
                gradient = p.grad
                if p.ndim == 2 and gradient is not None and gradient.any() and self.perturbs(name, p):
                    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
                    p.add_(RHO * torch.outer(U[:, 0], Vh[0]).to(p.dtype))
        for p, gradient in zip(trained, kept, strict=True):
            p.grad = gradient
        torch.set_rng_state(state)
        super().training_step(model, inputs, *args, **kwargs)
        with torch.no_grad():
            for p, values in zip(trained, before, strict=True):
                p.copy_(values)
        return loss


def trained(training, folder, *in_front, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    disable_progress_bars()
    kind, arguments = training(folder)
    torch.manual_seed(1)
    trainer = type("MyTrainer", (*in_front, kind), {})(**arguments, **options)
    trainer.train()
    return trainer


class ByHandButHeads(ByHand):
    perturbs = staticmethod(but_heads)


SEVERAL = ("SFT", "SFT, tied head", "DPO, LoRA")  # on all ways


@pytest.mark.parametrize(
    ("training", "way"),
    [(training, way) for training in TRAININGS for way in WAYS if training in SEVERAL or way == "default"],
)
def test_steps_are_those_of_a_loop_by_hand(training, way, tmp_path):
    options = WAYS[way] | ({"targets": but_heads} if way == "forward" else {})
    method = partial(nusam.NuSAM, rho=RHO, power_iterations=300, **options)
    by_hand = trained(TRAININGS[training], tmp_path, ByHandButHeads if way == "forward" else ByHand)
    ours = trained(TRAININGS[training], tmp_path, NuSAMTrainerMixin, sharpness_aware=method)
    plain = trained(TRAININGS[training], tmp_path)
    names = [name for name, p in plain.model.named_parameters() if p.requires_grad]
    weights = [dict(trainer.model.named_parameters()) for trainer in (ours, by_hand, plain)]
    off = max((weights[0][name] - weights[1][name]).abs().max() for name in names)
    moved = max((weights[2][name] - weights[1][name]).abs().max() for name in names)
    assert off < 1e-5
    assert moved > 100 * off
    losses = [[float(entry["loss"]) for entry in run.state.log_history if "loss" in entry] for run in (ours, by_hand)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("training", ["SFT", "SFT, tied head", "DPO, a reference of its own"])
def test_a_head_in_pieces_has_no_forward_for_its_perturbation(training, tmp_path):
    method = partial(nusam.NuSAM, rho=RHO, **WAYS["forward"])
    with pytest.raises(
        RuntimeError, match=r"^(model\.embed_tokens|lm_head)\.weight is .* exclude it with targets= or use"
    ):
        trained(TRAININGS[training], tmp_path, NuSAMTrainerMixin, sharpness_aware=method)


@pytest.mark.parametrize("targets", ["trainable", "frozen"])
def test_a_model_in_bfloat16_is_perturbed_but_for_its_head(targets, tmp_path):
    def training(folder):
        lora = targets == "frozen"
        kind, arguments = preferring(folder, None if lora else language_model(1), lora)
        arguments["model"] = arguments["model"].to(torch.bfloat16)
        return kind, arguments

    def chosen(name, parameter):
        return parameter.requires_grad == (targets == "trainable") and not name.endswith(HEADS)

    method = partial(nusam.NuSAM, rho=RHO, targets=chosen)
    ours = trained(training, tmp_path, NuSAMTrainerMixin, sharpness_aware=method)
    measured = sharpness_aware(ours.optimizer).metrics()
    epsilons = {name: value for name, value in measured.items() if name.startswith("epsilon/")}
    assert len(epsilons) == 7  # the matrices of a block
    assert list(epsilons.values()) == pytest.approx([RHO] * 7, rel=1e-3)


def test_completions_are_generated_once_for_both_passes(tmp_path):
    class Spying(trl.GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen = [*getattr(self, "seen", []), (self._step, inputs["completion_ids"].tolist())]
            seen.append(self.seen[-1])
            return super().compute_loss(model, inputs, *args, **kwargs)

    def run(rho, rate):
        AcceleratorState._reset_state(reset_partial_state=True)
        seen.clear()
        disable_progress_bars()
        model = language_model().float()
        kinds = (Spying,) if rho is None else (NuSAMTrainerMixin, Spying)
        options = {} if rho is None else {"sharpness_aware": partial(nusam.NuSAM, rho=rho)}
        trainer = type("MyTrainer", kinds, {})(
            model=model,
            args=trl.GRPOConfig(
                **common(tmp_path, max_steps=3, learning_rate=rate, gradient_accumulation_steps=2),
                num_generations=2,
                max_completion_length=4,
                steps_per_generation=2,
                num_iterations=2,
            ),
            train_dataset=Dataset.from_list([{"prompt": "ab" + c} for c in string.ascii_lowercase[2:]]),
            processing_class=tokenizer(),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            **options,
        )
        trainer.train()
        return trainer, list(seen)

    seen = []
    (plain, once), (ours, twice) = run(None, 0.0), run(0.5, 0.0)
    assert len(once) == 6
    assert twice == [call for call in once for _ in range(2)]  # step counters and completions
    for a, b in zip(history(ours, "num_tokens", "entropy"), history(plain, "num_tokens", "entropy"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    (plain, _), (ours, _) = run(None, 0.01), run(0.0, 0.01)
    for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)


def rewarding(folder):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vocab_size": len(LETTERS), "max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 1}
    return trl.RewardTrainer, {
        "model": LlamaForSequenceClassification(LlamaConfig(**sizes, **shape)),
        "args": trl.RewardConfig(**plainly(folder)),
        "train_dataset": preferences(),
        "processing_class": tokenizer(),
    }


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("training", [rewarding, TRAININGS["DPO, a reference of its own"]])
def test_pairs_are_not_cut_in_two(training, one_pass, tmp_path):
    method = partial(nusam.NuSAM, rho=RHO, ascent_share=1 / 2)
    with pytest.raises(ValueError, match="makes 8 rows of 4 samples, as of pairs"):
        trained(training, tmp_path, NuSAMTrainerMixin, sharpness_aware=method, one_pass=one_pass)


@pytest.mark.filterwarnings("ignore:one_pass=True can't be had")
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_share_of_the_completions_that_were_generated_once(one_pass, tmp_path):
    calls = []

    class Spying(trl.GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(inputs["completion_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def training(folder):
        options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4}
        return Spying, {
            "model": language_model(),
            "args": trl.GRPOConfig(**plainly(folder, **options, steps_per_generation=2, max_steps=4)),
            "train_dataset": Dataset.from_list([{"prompt": "ab" + c} for c in string.ascii_lowercase]),
            "processing_class": tokenizer(),
            "reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions],
        }

    method = partial(nusam.NuSAM, rho=3.0, ascent_share=1 / 4)
    ours = trained(training, tmp_path, NuSAMTrainerMixin, sharpness_aware=method, one_pass=one_pass)
    assert [len(call) for call in calls] == [2, 8] * 4
    width = min(len(row) for call in calls for row in call)
    assert all(
        [row[:width] for row in part] == [row[:width] for row in whole[:2]]
        for part, whole in zip(calls[::2], calls[1::2], strict=True)
    )
    assert ours._step == 4
