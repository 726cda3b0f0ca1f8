"""The modules of a model, walked once and again only where the model has changed."""

from torch import nn

__all__ = ["ModuleTree"]


class ModuleTree:
    """All modules of a model as a flat list."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._find()

    def _find(self) -> None:
        self.modules = list(self.model.modules())
        self._families = [module._modules for module in self.modules]
        self._children = self._read()

    def _read(self) -> list[nn.Module | None]:
        return [child for family in self._families for child in family.values()]

    def refresh(self) -> bool:
        """Walk the model again if any module in it gained, lost or replaced a child; whether one did."""
        now = self._read()
        if len(now) == len(self._children) and all(a is b for a, b in zip(now, self._children, strict=True)):
            return False
        self._find()
        return True
