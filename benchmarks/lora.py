"""νSAM on LoRA: peak memory and step time over plain LoRA's, and what it does for a small encoder's accuracy.

``python benchmarks/lora.py`` weighs and times an encoder of MiniLM's shape, dense and quantized.
``python benchmarks/lora.py --encoder FOLDER --sentences FOLDER`` runs ``examples/lora.py`` for several ρ and seeds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

import peft
import torch
import transformers
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

import nusam
from nusam.experiments.recipes.allocations import mark, moments
from recording import record

EXAMPLE = Path(__file__).parents[1] / "examples" / "lora.py"
SENTENCES, TOKENS, ROUNDS = 8, 64, 5
SEEDS, RADII = (0, 1, 2), (0.0005, 0.002)
MB = 2**20

BASES = {
    "float32": None,
    "bitsandbytes 4-bit": transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
    ),
    "bitsandbytes 8-bit": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"]),
    "torchao int8": transformers.TorchAoConfig(
        quant_type=Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"]
    ),
}
Wrap = Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer]
METHODS: dict[str, Wrap] = {
    "plain LoRA": lambda base, model: base,
    "νSAM on the factors": lambda base, model: nusam.NuSAM(base, model=model),
    "νSAM under the adapters": lambda base, model: nusam.NuSAM(
        base, model=model, targets=lambda name, parameter: ".base_layer." in name
    ),
    "νSAM on all frozen matrices": lambda base, model: nusam.NuSAM(base, model=model, targets="frozen"),
}


class Step:
    """One training step of an encoder of MiniLM's shape with random weights, quantized on loading."""

    def __init__(self, folder: str, base: str, adapters: str | list[str], wrap: Wrap) -> None:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification.from_pretrained(
            folder, quantization_config=BASES[base], device_map="cpu"
        )
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:  # lets go of the buffer that all were loaded into
                parameter.data = parameter.data.clone()
        config = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=adapters)
        self.model = peft.get_peft_model(model, config).train()
        self.opt = wrap(torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad]), self.model)
        self.tokens = torch.randint(0, 30000, (SENTENCES, TOKENS))
        self.labels = torch.randint(0, 2, (SENTENCES,))

    def __call__(self) -> None:
        for name in self.opt.passes() if isinstance(self.opt, nusam.SharpnessAware) else ["descent"]:
            loss: Tensor = self.model(input_ids=self.tokens, labels=self.labels).loss
            mark(f"{name} forward")
            loss.backward()
            del loss
            mark(name)
        self.opt.step()
        self.opt.zero_grad()


def weighed(make: Callable[[], Step]) -> tuple[float, float]:
    """MB at the peak of the second step, and what the first forward of it left alive for its backward."""

    def program() -> None:
        step = make()
        step()
        mark("second")
        step()

    seen = moments(program)
    second = seen[[moment.mark for moment in seen].index("second") :]
    forward = next(moment.live for moment in second if moment.mark.endswith(" forward"))
    return max(moment.live for moment in second) / MB, (forward - second[0].live) / MB


def seconds(steps: dict[str, Step]) -> dict[str, float]:
    """Median CPU seconds of a step, the methods taking turns."""
    taken: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(ROUNDS + 1):
        for method, step in steps.items():
            began = time.process_time()
            step()
            taken[method].append(time.process_time() - began)
    return {method: median(rounds[1:]) for method, rounds in taken.items()}


def costs() -> None:
    torch.set_num_threads(1)
    table = []
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    with tempfile.TemporaryDirectory() as folder:
        transformers.BertForSequenceClassification(transformers.BertConfig(**shape)).save_pretrained(folder)
        for base, adapters in [*((base, "all-linear") for base in BASES), ("float32", ["query", "value"])]:
            memory = {m: weighed(lambda w=w: Step(folder, base, adapters, w)) for m, w in METHODS.items()}  # noqa: B023
            taken = seconds({m: Step(folder, base, adapters, w) for m, w in METHODS.items()})
            for method, (peak, kept) in memory.items():
                table.append(
                    {
                        "base": base,
                        "adapters on": adapters if isinstance(adapters, str) else ", ".join(adapters),
                        "method": method,
                        "peak, MB": f"{peak:.1f}",
                        "peak / LoRA": f"{peak / memory['plain LoRA'][0]:.4f}",
                        "kept by the first forward, MB": f"{kept:.1f}",
                        "step time / LoRA": f"{taken[method] / taken['plain LoRA']:.2f}",
                    }
                )
                print(table[-1], flush=True)
    record(
        "lora",
        "cpu",
        table,
        f"BERT of MiniLM's shape (22.7 million parameters, random), LoRA of rank 8, AdamW, {SENTENCES} sentences of "
        f"{TOKENS} tokens. Bytes counted by the allocator over the second step; step time is CPU time of one thread, "
        f"medians of {ROUNDS} alternated steps.",
    )


def accuracies(encoder: str, sentences: str) -> None:
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for method, radii in (("lora", (0.0,)), ("factors", RADII), ("full", RADII)):
        for rho in radii:
            found[method, rho] = [_run(encoder, sentences, method, rho, seed) for seed in SEEDS]
            print(method, rho, found[method, rho], flush=True)
    plain = [test for _, test in found["lora", 0.0]]
    table = []
    for (method, rho), runs in found.items():
        best = max((r for m, r in found if m == method), key=lambda r: mean(v for v, _ in found[method, r]))
        differences = [test - other for (_, test), other in zip(runs, plain, strict=True)]
        table.append(
            {
                "method": {"lora": "plain LoRA", "factors": "νSAM on the factors", "full": "νSAM on the base"}[method],
                "ρ": f"{rho:g}" if rho else "–",
                "validation accuracy": _interval([validation for validation, _ in runs]),
                "test accuracy": _interval([test for _, test in runs]),
                "over plain LoRA": _interval(differences, signed=True) if rho else "–",
                "chosen by validation": "yes" if rho == best else "",
            }
        )
    record(
        "lora-accuracy",
        "cpu",
        table,
        "`examples/lora.py` with all-MiniLM-L6-v2: 250 movie-review sentences, 5 epochs, adapters on all linear "
        "layers. Accuracy in % on 300 (validation) and 800 (test) others, mean ± s.e. of "
        f"{len(SEEDS)} seeds, each with its own split, head and adapters; differences pair the seeds.",
    )


def _run(encoder: str, sentences: str, method: str, rho: float, seed: int) -> tuple[float, float]:
    """Validation and test accuracy of one training, in %."""
    command = [sys.executable, EXAMPLE, "--encoder", encoder, "--sentences", sentences]
    command += ["--method", method, "--rho", str(rho), "--seed", str(seed), "--ascent-share", "1"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    validation, test = re.findall(r"accuracy ([\d.]+)%", output)
    return float(validation), float(test)


def _interval(values: list[float], signed: bool = False) -> str:
    text = f"{mean(values):{'+' if signed else ''}.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"
    return text.replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder")
    parser.add_argument("--sentences")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (args.encoder is None) != (args.sentences is None):
        parser.error("--encoder and --sentences go together; give both for the accuracy, or none for the costs.")
    if args.encoder is None:
        costs()
    else:
        accuracies(args.encoder, args.sentences)


if __name__ == "__main__":
    main()
