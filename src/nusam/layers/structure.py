"""Where a model uses its matrices, found in one walk over its modules and kept until they change."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nusam.distributed.surroundings import has_replicas
from nusam.layers.idle import IdleLayers
from nusam.layers.memory import with_shared_memory
from nusam.layers.module_tree import is_compiled, outside_of_graphs
from nusam.layers.uses import Use, find_uses

__all__ = ["HOOKED", "Structure"]

HOOKED = "given a hook on its gradient"


class Structure:
    """The uses of a model's matrices by layers that are known.

    Args:
        model: the module being trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.uses = [] if has_replicas(model) else list(find_uses(model))
        self._by_parameter: dict[Tensor, list[Use]] = defaultdict(list)
        for use in self.uses:
            self._by_parameter[use.parameter].append(use)
        self.groups: dict[Tensor, int] = {use.parameter: use.kind.groups for use in self.uses}
        self.idle = IdleLayers(model)
        self.look_for_shared_memory()

    def look_for_shared_memory(self) -> None:
        """Which parameters hold entries of others, whose memory they may be given at any time."""
        self.sharing = with_shared_memory(self.model.parameters())

    def is_current(self) -> bool:
        """Whether the modules still use what they used; cheap enough for every step."""
        return all(use.is_current() for use in self.uses)

    def modes(self) -> tuple[bool, ...]:
        """Which modules are in training mode."""
        return (self.model.training, *(use.module.training for use in self.uses))

    def uses_of(self, parameter: Tensor) -> list[Use]:
        """The layers that hold the parameter."""
        return self._by_parameter.get(parameter, [])

    def in_graphs(self) -> set[Tensor]:
        """The parameters of layers that a compiled module calls, unseen by Python."""
        called = {module for module in outside_of_graphs(self.model) if not is_compiled(module)}
        return {use.parameter for use in self.uses if use.module not in called}

    def why_not_served(self, parameters: Iterable[Tensor]) -> dict[Tensor, str]:
        """The parameters that no layer can serve on its own, as far as the structure tells."""
        reasons = {}
        for parameter in parameters:
            count = len(self.uses_of(parameter))
            if count == 0:
                reasons[parameter] = "no known layer holds it"
            elif has_hooks(parameter):
                reasons[parameter] = HOOKED
            elif count > 1 and parameter.requires_grad:  # else served by the sum over its uses
                reasons[parameter] = f"tied: used by {count} layers"
        return reasons


def has_hooks(parameter: Tensor) -> bool:
    """Whether somebody's hook changes or reads the parameter's gradient, which then is not that of its layer."""
    own: dict[int, Any] = parameter._backward_hooks or {}
    late: dict[int, Any] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    hooks = (*own.values(), *late.values())
    return not all((getattr(hook, "__module__", None) or "").startswith("nusam.") for hook in hooks)
