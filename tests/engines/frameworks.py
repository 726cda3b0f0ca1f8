"""What two processes say of accelerate and Trainer on DeepSpeed; ``python -m tests.engines.frameworks said.json``."""

import functools
import json
import re
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import nusam
from nusam.integrations.accelerate import passes
from nusam.integrations.transformers import NuSAMTrainerMixin
from tests.engines.deepspeeding import (
    BATCH,
    RHO,
    STEPS,
    alone,
    configured,
    distance,
    in_processes,
    net,
    part,
    sample,
    sgd,
    weights,
)

HALF = STEPS // 2  # where a run is saved and taken up
CASES = {  # ZeRO's stage, micro-batches of a step, dtype, offload
    "ZeRO 2, accumulation": (2, 2, "float32", False),
    "ZeRO 3": (3, 1, "float32", False),
}


def accelerator_of(case):
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=configured(case)))


def prepared(case):
    """What a script on accelerate has."""
    accelerator = accelerator_of(case)
    model = net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    perturbation = nusam.Perturbation(model, RHO)
    accelerator.register_for_checkpointing(perturbation)
    return accelerator, model, optimizer, perturbation


def train(accelerator, model, optimizer, perturbation, case, steps):
    _, micro_batches, *_ = case
    for step in steps:
        for i in range(micro_batches):
            with accelerator.accumulate(model):
                for xs, ys in passes(perturbation, model, *part(step * micro_batches + i)):
                    accelerator.backward(F.cross_entropy(model(xs), ys))
                optimizer.step()
                optimizer.zero_grad()


def through_accelerate(case, folder):
    whole = prepared(case)
    train(*whole, case, range(HALF))
    whole[0].save_state(folder)
    train(*whole, case, range(HALF, STEPS))
    resumed = prepared(case)
    resumed[0].load_state(folder)
    train(*resumed, case, range(HALF, STEPS))
    found = weights(whole[1])
    try:
        next(passes(whole[2], whole[1]))
        refused = "nothing"
    except (NotImplementedError, TypeError) as error:
        refused = str(error)
    return {
        "off": distance(found, alone(case)),
        "without off": distance(found, alone(case, 0.0)),
        "resumed off": distance(found, weights(resumed[1])),
        "steps": steps_of(whole[3]),
        "refused": refused,
        "processes": whole[0].num_processes,
    }


def steps_of(perturbation):
    return perturbation.state_dict()["steps"]


class WithLoss(nn.Module):
    """As Trainer wants its models: the loss comes from the forward."""

    def __init__(self):
        super().__init__()
        self.layers = net()

    def forward(self, x, labels):
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Trained(NuSAMTrainerMixin, Trainer):
    """With the optimizer of the other loops."""

    def create_optimizer(self, *args, **kwargs):
        self.optimizer = sgd(self.model)
        return super().create_optimizer(*args, **kwargs)


def trainer_of(case, folder, method=None, kind=Trained, **options):
    _, micro_batches, *_ = case
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=configured(case),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // dist.get_world_size(),
        gradient_accumulation_steps=micro_batches,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=HALF,
        logging_steps=5,
        report_to=[],
        disable_tqdm=True,
    )
    method = method or functools.partial(nusam.Perturbation, rho=RHO)
    return kind(WithLoss(), arguments, train_dataset=rows(STEPS * micro_batches), sharpness_aware=method, **options)


class ElsewhereTrained(Trained):
    """Whose steps do not reach the mixin's."""

    def training_step(self, model, inputs, *args, **kwargs):
        return Trainer.training_step(self, model, inputs, *args, **kwargs)


def through_trainer(case, folder):
    trainer = trainer_of(case, folder)
    trainer.train()
    found = weights(trainer.model_wrapped)
    resumed = trainer_of(case, folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{HALF}")
    return {
        "off": distance(found, alone(case)),
        "without off": distance(found, alone(case, 0.0)),
        "resumed off": distance(found, weights(resumed.model_wrapped)),
        "steps": steps_of(resumed._engine._perturbation),
        "logged": [log["active"] for log in trainer.state.log_history if "active" in log],
    }


def refusals(case, folder):
    """What is said of what can't be had."""
    said = {}
    for name, ask in {
        "another method": lambda: trainer_of(case, folder, method=nusam.SAM),
        "one pass": lambda: trainer_of(case, folder, one_pass=True),
        "another training_step": lambda: trainer_of(case, folder, kind=ElsewhereTrained).train(),
        "another argument": lambda: trainer_of(
            case, folder, method=functools.partial(nusam.NuSAM, ascent="gradient")
        ).train(),
    }.items():
        try:
            ask()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def run_the_page(folder):
    """Both recipes of docs/deepspeed.md; the steps that each took."""
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text("utf-8")
    recipes = dict(re.findall(r'```py title="(accelerate|Trainer)"\n(.*?)```', page, flags=re.DOTALL))
    accelerator = accelerator_of(CASES["ZeRO 2, accumulation"])
    model = net()
    names = {
        "nusam": nusam,
        "accelerator": accelerator,
        "model": model,
        "optimizer": sgd(model),
        "loader": DataLoader([row for i in range(4) for row in zip(*sample(i), strict=True)], BATCH // 2),
        "criterion": F.cross_entropy,
    }
    exec(compile(recipes["accelerate"], "docs/deepspeed.md", "exec"), names)
    steps = {"accelerate": steps_of(names["perturbation"])}
    file = Path(folder, "zero2.json")
    file.parent.mkdir(exist_ok=True)
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    file.write_text(json.dumps({**configured(CASES["ZeRO 2, accumulation"]), **dict.fromkeys(automatic, "auto")}))
    options = {"report_to": [], "disable_tqdm": True, "max_steps": 3}
    names |= {
        "functools": functools,
        "NuSAMTrainerMixin": NuSAMTrainerMixin,
        "Trainer": Trainer,
        "TrainingArguments": lambda output_dir, deepspeed: TrainingArguments(
            str(file.parent / output_dir), deepspeed=str(file.parent / deepspeed), **options
        ),
        "model": WithLoss(),
        "data": rows(4),
    }
    exec(compile(recipes["Trainer"], "docs/deepspeed.md", "exec"), names)
    return {**steps, "Trainer": steps_of(names["trainer"]._engine._perturbation)}


def rows(samples):
    return [{"x": x, "labels": y} for i in range(samples) for x, y in zip(*sample(i), strict=True)]


def processes_on_cpus(self, cpu=False, sagemaker_dp=False, backend=None):
    """What accelerate finds by itself on GPUs: on CPUs it takes DeepSpeed for a single process."""
    return "gloo", DistributedType.MULTI_CPU


def said(folder):
    PartialState._prepare_backend = processes_on_cpus
    found = {"accelerate": {}, "trainer": {}}
    for index, (name, case) in enumerate(CASES.items()):
        found["accelerate"][name] = through_accelerate(case, f"{folder}/accelerate-{index}")
        AcceleratorState._reset_state(reset_partial_state=True)
        found["trainer"][name] = through_trainer(case, f"{folder}/trainer-{index}")
    found["steps of the page"] = run_the_page(f"{folder}/page")
    found["refusals"] = refusals(CASES["ZeRO 3"], f"{folder}/refused")
    return found


if __name__ == "__main__":
    in_processes(said, sys.argv[1])
