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
    from nusam import lmo
    from nusam.coverage import Coverage
    from nusam.methods import (
        ASAM,
        GSAM,
        RWP,
        SAM,
        SAMON,
        SSAM,
        USAM,
        WSAM,
        FriendlySAM,
        GaussSAM,
        LookSAM,
        NuSAM,
        NuSAMNorm,
        VaSSO,
    )
    from nusam.optimizer import SharpnessAware
    from nusam.perturbation import Perturbation
    from nusam.stepping import step_in_backward
    from nusam.tools import memory
    from nusam.tools.memory import perturbation_numel
    from nusam.tools.radius_search import RadiusSearch, find_rho
    from nusam.tools.sharpness import Sharpness, sharpness

try:
    __version__ = version("nusam")
except PackageNotFoundError:  # a source tree on the path that nobody installed
    __version__ = "0.0"

__all__ = [
    "WSAM",
    "VaSSO",
    "USAM",
    "SSAM",
    "RWP",
    "LookSAM",
    "GSAM",
    "FriendlySAM",
    "ASAM",
    "SAM",
    "SAMON",
    "Coverage",
    "Sharpness",
    "GaussSAM",
    "NuSAM",
    "NuSAMNorm",
    "Perturbation",
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

_METHODS = (
    "ASAM", "FriendlySAM", "GSAM", "GaussSAM", "LookSAM", "NuSAM", "NuSAMNorm", "RWP", "SAM", "SAMON", "SSAM", "USAM",
    "VaSSO", "WSAM",
)  # fmt: skip
_MODULE_OF = {
    **dict.fromkeys(_METHODS, "methods"),
    **dict.fromkeys(("RadiusSearch", "find_rho"), "tools.radius_search"),
    **dict.fromkeys(("Sharpness", "sharpness"), "tools.sharpness"),
    "SharpnessAware": "optimizer",
    "step_in_backward": "stepping",
    "Coverage": "coverage",
    "Perturbation": "perturbation",
    "perturbation_numel": "tools.memory",
}
_MODULES = {"lmo": "lmo", "memory": "tools.memory"}


class _Package(ModuleType):
    """The package, which imports a name, and torch with it, when the name is first asked for.

    What needs no torch, such as ``nusam --help``, so does not wait for it.
    """

    def __getattr__(self, name: str) -> object:
        if name in _MODULE_OF:
            value = getattr(import_module(f"nusam.{_MODULE_OF[name]}"), name)
        elif name in _MODULES:
            value = import_module(f"nusam.{_MODULES[name]}")
        else:
            raise AttributeError(f"module 'nusam' has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
