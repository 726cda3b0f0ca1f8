"""nusam: sharpness-aware minimization cheap enough to leave switched on.

``opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.05)`` and a loop over
``opt.passes()`` are all that an existing training loop needs.
"""

from importlib.metadata import PackageNotFoundError, version

from nusam import lmo, memory
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
