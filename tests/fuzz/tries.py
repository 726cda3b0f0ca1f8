"""What a loop may try inside a pass, and what of it must be refused."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.fuzz import sentences
from tests.fuzz.trees import Net


def tried(what: str, opt: Any, model: Net, guarded: bool) -> str:
    """Try it, and go on; which refusal it met, if any. ``guarded``: whether the model's weights are perturbed now."""
    try:
        _tries(opt, model)[what]()
    except RuntimeError as error:
        refused = error
    else:
        due = {"save the model": guarded, "evaluate": guarded and model.training}.get(what, True)
        assert not due, f"{what} was not refused"
        return ""
    assert sentences.is_ours(refused), refused
    said = sentences.heard(str(refused), sentences.INSIDE_PASS, sentences.SAVED, sentences.EVALUATED)
    assert said, refused
    return said.pattern


def _tries(opt: Any, model: Net) -> dict[str, Callable[[], Any]]:
    return {
        "save the model": model.state_dict,
        "evaluate": lambda: _evaluate(model),
        "save": opt.state_dict,
        "load": lambda: opt.load_state_dict({}),
        "step": opt.step,
        "copy": lambda: copy.deepcopy(opt),
        "add": lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]}),
        "nest": lambda: next(opt.passes()),
        "ascend": lambda: opt.ascent().__enter__(),
    }


def _evaluate(model: Net) -> None:
    modes = [module.training for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(torch.ones(2, model.head.in_features, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
