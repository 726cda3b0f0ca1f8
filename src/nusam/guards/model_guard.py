"""What two passes would do to a model beyond its gradients, and what ``model=`` switches on against it.

Buffers would move twice, dropout would draw two masks, and perturbed weights could be saved or evaluated.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nusam.distributed.blocks import compute_device
from nusam.guards.buffers import Buffers
from nusam.guards.others import Others
from nusam.interrupts import always
from nusam.layers.module_tree import ModuleTree

__all__ = ["ModelGuard", "RandomState", "normalization_parameters"]


class ModelGuard:
    """What is undone or refused in the two passes of every step of one model; without a model nothing is."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.tree = None if model is None else ModuleTree(model)
        self._buffers = None if self.tree is None else Buffers(self.tree)
        self.others = Others(self.tree)
        self._refusal = None if self.tree is None else _Refusal(self.tree)
        self._random_state: RandomState | None = None
        self._replayed: RandomState | None = None  # in the last descent
        self._ascended = False
        self._walk = 0
        self._on_each_device: list[nn.Parameter] = []
        self._generators: list[torch.Generator] = []

    def __reduce__(self) -> tuple[type, tuple[nn.Module | None]]:
        # what is remembered belongs to one step, and steps are not copied
        return ModelGuard, (self.model,)

    @contextmanager
    def ascent(self, everything: bool, share: float) -> Iterator[None]:
        """The first pass over a sample, or over a share of it, which then what the model raises says."""
        self.before_ascent(everything)
        with nullcontext() if self.model is None or share == 1 else _Explanation(share).of(self.model):
            yield

    def before_ascent(self, everything: bool = False) -> None:
        """Remember generators and buffers as they are; ``everything``: large ones too, which waits for the device."""
        self._ascended = False
        if self.tree is not None and self._buffers is not None:
            self._buffers.before_ascent(everything)
            if everything or self._walk != self.tree.walks:
                self._walk = self.tree.walks
                self._on_each_device = list({compute_device(p): p for p in self.tree.parameters()}.values())
                attributes = (value for module in self.tree.modules for value in vars(module).values())
                self._generators = [value for value in attributes if isinstance(value, torch.Generator)]
            self._random_state = RandomState(self._on_each_device, self._generators)

    def random_state(self) -> "RandomState":
        """The generators as they are."""
        return RandomState(self._on_each_device, self._generators)

    def rewind(self) -> None:
        """Go back to where the last ascent started, which is to be run again."""
        if self._buffers is not None and self._random_state is not None:
            self._buffers.rewind()
            self._random_state.replay()

    def start_over(self) -> None:
        """Go back to where the last step's ascent started, after its descent."""
        if self._buffers is not None and self._replayed is not None:
            self._buffers.start_over()
            self._replayed.replay()

    def after_ascent(self) -> None:
        """The ascent is complete: the next descent is its second pass."""
        self._ascended = True

    def forget_ascent(self) -> None:
        """The next descent is no second pass."""
        self._ascended = False

    @contextmanager
    def descent(self, perturbed: bool, of_ascent: bool = True) -> Iterator[None]:
        """The second pass over a sample, if an ascent came before: from the same buffers and generators.

        ``perturbed``: whether any weight is, so that saving, copying and evaluating the model must be refused;
        ``of_ascent``: whether the buffers that stay are those that the ascent left, rather than the descent's.
        """
        second, self._ascended = self._ascended, False
        random_state, self._random_state = self._random_state, None
        self._replayed = random_state
        with ExitStack() as contexts:
            if perturbed and self._refusal is not None:
                contexts.enter_context(self._refusal.armed())
            if second and self._buffers is not None and random_state is not None:
                if of_ascent:
                    contexts.enter_context(self._buffers.second_pass())
                else:
                    self._buffers.rewind()
                random_state.replay()
            yield


class RandomState:
    """The random generators of torch on every device at work, of Python and of numpy, to be replayed.

    Args:
        parameters: whose devices are at work.
        generators: those of the model's own.
    """

    def __init__(self, parameters: Iterable[Tensor], generators: Iterable[torch.Generator] = ()) -> None:
        devices = {compute_device(parameter) for parameter in parameters} | _current_devices()
        self._states: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
        self._states.append((torch.set_rng_state, torch.get_rng_state()))
        self._states += [(generator.set_state, generator.get_state()) for generator in generators]
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            self._states.append((numpy_random.set_state, numpy_random.get_state(legacy=False)))
        self._on_devices = [
            (device, torch.get_device_module(device).get_rng_state(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def is_that_of(self, other: "RandomState") -> bool:
        """Whether nothing was drawn in between."""
        return _same([*self._states, *self._on_devices], [*other._states, *other._on_devices])

    def replay(self) -> None:
        """Set the generators back, so that the next pass draws the same dropout masks."""
        for set_state, state in self._states:
            set_state(state)
        for device, state in self._on_devices:
            torch.get_device_module(device).set_rng_state(state, device)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def _current_devices() -> set[torch.device]:
    """Where a model whose parameters lie elsewhere in between (offloaded ones) may compute."""
    started = [(kind, module) for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)) if module.is_initialized()]
    return {torch.device(kind, module.current_device()) for kind, module in started}


def normalization_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The own parameters of every normalization layer: modules whose class name contains "norm"."""
    layers = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    return {parameter for layer in layers for parameter in layer.parameters(recurse=False)}


class _Explanation:
    """A hook that lets what a model raises of a share say so: its samples may be too few, as one is for batch norm.

    Args:
        share: of the batch; None where there is nothing to say.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share

    def __reduce__(self) -> Any:  # a copy of the model is called outside of the pass
        return _Explanation, (None,)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        raised = sys.exc_info()[1]
        if raised and output is None and self._share is not None and hasattr(raised, "add_note"):  # from Python 3.11 on
            raised.add_note(
                f"nusam: this was the ascent, which sees a share of the batch, ascent_share={self._share:g}; where the "
                "model needs several samples, as batch norm does, let the share leave as many of the smallest batch."
            )

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the hook."""
        hooks: tuple[dict[int, Any], ...] = (model._forward_hooks, model._forward_hooks_always_called)

        def undo() -> None:
            for own in hooks:
                own.pop(id(self), None)

        with always(undo):
            for own in hooks:
                own[id(self)] = self
            yield


class _Refusal:
    """Hooks that refuse to save, copy and evaluate a model, and to be copied or pickled with its modules.

    Saving is refused by every module that holds weights, an evaluation by the model and what it merely wraps
    (DistributedDataParallel, a compiled module): calls without gradients in eval mode of what was in training mode
    when the pass began. A training step makes calls without gradients of its own, for pseudo-labels, for cached
    representations or in a re-entrant checkpoint.
    """

    def __init__(self, tree: ModuleTree) -> None:
        self._tree = tree
        self._armed = False
        self._trained: set[nn.Module] = set()
        self._key = id(self)  # of our hooks, among a module's own
        self._find()

    def _find(self) -> None:
        self._walk = self._tree.walks
        self._called = dict.fromkeys(_with_wrapped(self._tree.model))
        self._saved = [module for module in self._tree.modules if module._parameters or module in self._called]

    @contextmanager
    def armed(self) -> Iterator[None]:
        """While the weights are perturbed."""
        self._tree.refresh()
        if self._walk != self._tree.walks:
            self._find()

        def undo() -> None:
            self._armed = False
            key = self._key
            for module in self._saved:  # a handle for each hook would cost ten times as much
                module._state_dict_pre_hooks.pop(key, None)
            for module in self._called:
                module._forward_pre_hooks.pop(self._key, None)

        with always(undo):
            self._trained = {module for module in self._called if module.training}
            self._armed = True
            key, refuse = self._key, self._refuse_saving
            for module in self._saved:
                module._state_dict_pre_hooks[key] = refuse
            for module in self._called:
                module._forward_pre_hooks[key] = self._refuse_evaluation
            yield

    def _refuse_saving(self, *_: Any) -> None:
        if self._armed:
            raise RuntimeError(
                "The model's weights are perturbed inside the descent pass and can't be saved or copied there; "
                "do it after the pass."
            )

    def _refuse_evaluation(self, module: nn.Module, *_: Any) -> None:
        if self._armed and not module.training and not torch.is_grad_enabled() and module in self._trained:
            raise RuntimeError(
                "The model was called in eval mode without gradients inside the descent pass, where its weights are "
                "perturbed; evaluate it after the pass."
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_saving()
        return self.__dict__


def _with_wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what it merely wraps."""
    yield model
    children = list(model.children())
    if len(children) == 1:
        yield from _with_wrapped(children[0])
