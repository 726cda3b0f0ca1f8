"""The methods by name: thin names for :class:`~nusam.optimizer.SharpnessAware` with a norm ball."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.guards.model_guard import normalization_parameters
from nusam.lmo import L2, Gaussian, Nuclear, NuclearNormalized
from nusam.optimizer import Options, SharpnessAware

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GaussSAM", "NuSAM", "NuSAMNorm", "SAM", "SAMON"]


class NuSAM(SharpnessAware):
    """νSAM (Algorithm 1): rank-one perturbation ρ·u·vᵀ of every weight matrix, n+m floats instead of n·m.

    Only 2-D parameters are perturbed; ρ holds for each matrix on its own. Takes every argument of
    :class:`SharpnessAware`.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the nuclear-norm ball of each matrix. Its useful range is below SAM's and depends on
            width and architecture.
        power_iterations: T of Algorithm 2; the paper finds 1 sufficient (Table 10).
    """

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, power_iterations: int = 1, **options: "Unpack[Options]"
    ) -> None:
        super().__init__(base_optimizer, Nuclear(power_iterations), rho, **options)


class NuSAMNorm(SharpnessAware):
    """νSAM-Norm (Appendix C.1): as :class:`NuSAM`, with one radius shared by all matrices, eq. (21)."""

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, power_iterations: int = 1, **options: "Unpack[Options]"
    ) -> None:
        super().__init__(base_optimizer, NuclearNormalized(power_iterations), rho, **options)


class SAM(SharpnessAware):
    """SAM (Foret et al. 2020): ε = ρ·∇f/‖∇f‖₂ over all parameters; keeps a second copy of the weights."""

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        super().__init__(base_optimizer, L2(), rho, **options)


class SAMON(SharpnessAware):
    """SAM-ON (Müller et al. 2023): SAM on the parameters of normalization layers only.

    Needs ``model=`` to find them: modules whose class name contains "norm". The paper gives it no delay.
    """

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        if options.get("model") is None:
            raise ValueError("SAMON perturbs normalization layers only and needs model= to find them; pass the model.")
        super().__init__(base_optimizer, L2(), rho, **options)

    _few_by_design = True
    _needs_model = True

    @property
    def _target(self) -> str:
        return "parameter of a normalization layer"

    def _perturbs(self, parameter: Tensor) -> bool:
        return parameter in self._normalization and super()._perturbs(parameter)

    @cached_property
    def _normalization(self) -> set[nn.Parameter]:
        return normalization_parameters(cast(nn.Module, self.model))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.__dict__.pop("_normalization", None)  # the group may bring layers that the model did not have
        super().add_param_group(param_group)


class GaussSAM(SharpnessAware):
    """GaussSAM (Figure 1's control): ε = ρ·e/‖e‖₂ with Gaussian e, at SAM's cost."""

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        super().__init__(base_optimizer, Gaussian(), rho, **options)
