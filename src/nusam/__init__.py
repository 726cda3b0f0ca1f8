"""nusam: sharpness-aware minimization cheap enough to leave switched on.

``opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.05)`` and a loop over
``opt.passes()`` are all that an existing training loop needs.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nusam import lmo, memory
    from nusam.coverage import Coverage
    from nusam.memory import perturbation_numel
    from nusam.methods import SAM, SAMON, GaussSAM, NuSAM, NuSAMNorm
    from nusam.radius_search import RadiusSearch, find_rho
    from nusam.sharpness import Sharpness, sharpness
    from nusam.sharpness_aware import SharpnessAware, step_in_backward

try:
    __version__ = version("nusam")
except PackageNotFoundError:  # a source tree on the path that nobody installed
    __version__ = "0.0"

__all__ = [
    "SAM",
    "SAMON",
    "Coverage",
    "Sharpness",
    "GaussSAM",
    "NuSAM",
    "NuSAMNorm",
    "RadiusSearch",
    "SharpnessAware",
    "__version__",
    "find_rho",
    "lmo",
    "memory",
    "perturbation_numel",
    "sharpness",
    "step_in_backward",
]

_MODULE_OF = {
    **dict.fromkeys(("SAM", "SAMON", "GaussSAM", "NuSAM", "NuSAMNorm"), "methods"),
    **dict.fromkeys(("RadiusSearch", "find_rho"), "radius_search"),
    **dict.fromkeys(("Sharpness", "sharpness"), "sharpness"),
    **dict.fromkeys(("SharpnessAware", "step_in_backward"), "sharpness_aware"),
    "Coverage": "coverage",
    "perturbation_numel": "memory",
}
_MODULES = {"lmo", *_MODULE_OF.values()}


class _Package(ModuleType):
    """The package, which imports a name, and torch with it, when the name is first asked for.

    What needs no torch, such as ``nusam --help``, so does not wait for it.
    """

    def __getattr__(self, name: str) -> object:
        if name in _MODULE_OF:
            value = getattr(import_module(f"nusam.{_MODULE_OF[name]}"), name)
        elif name in _MODULES:
            value = import_module(f"nusam.{name}")
        else:
            raise AttributeError(f"module 'nusam' has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Every module is bound to its package as it is imported; where a function has its name, the function is meant.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
