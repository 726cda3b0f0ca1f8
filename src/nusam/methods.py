"""The methods by name: thin names for :class:`~nusam.optimizer.SharpnessAware` with a norm ball."""

from inspect import signature
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.combinations import LookBack, SurrogateGap, Weighted
from nusam.coverage import Candidate
from nusam.directions import Adaptive, Averaged, Friendly, RowNoise, Sparse
from nusam.guards.checks import check_between, check_count, check_radius
from nusam.guards.model_guard import normalization_parameters
from nusam.lmo import L2, Gaussian, Nuclear, NuclearNormalized, Unnormalized
from nusam.optimizer import Options, SharpnessAware
from nusam.wrapper import refuse_setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ASAM",
    "FriendlySAM",
    "GSAM",
    "GaussSAM",
    "LookSAM",
    "NuSAM",
    "NuSAMNorm",
    "RWP",
    "SAM",
    "SAMON",
    "SSAM",
    "USAM",
    "VaSSO",
    "WSAM",
]


class NuSAM(SharpnessAware):
    """νSAM (Algorithm 1): rank-one perturbation ρ·u·vᵀ of every weight matrix, n+m floats instead of n·m.

    Only 2-D parameters are perturbed unless ``convolutions=True``; ρ holds for each matrix on its own. Takes every
    argument of :class:`SharpnessAware`.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the nuclear-norm ball of each matrix. Its useful range is below SAM's and depends on
            width and architecture.
        power_iterations: T of Algorithm 2; the paper finds 1 sufficient (Table 10).
        convolutions: whether the kernels of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` are perturbed too, which
            the paper leaves alone. A kernel (o, i/g, k, …) of g groups counts as one matrix of o rows and i/g·k·…
            columns, as it stands in memory, also where g > 1 and its rows meet different channels. ``model=`` tells
            which parameters are such kernels; without it every parameter of three to five dimensions counts as one.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        *,
        power_iterations: int = 1,
        convolutions: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        super().__init__(base_optimizer, Nuclear(power_iterations, convolutions), rho, **options)


class NuSAMNorm(SharpnessAware):
    """νSAM-Norm (Appendix C.1): as :class:`NuSAM`, with one radius shared by all matrices, eq. (21)."""

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        *,
        power_iterations: int = 1,
        convolutions: bool = False,
        **options: "Unpack[Options]",
    ) -> None:
        super().__init__(base_optimizer, NuclearNormalized(power_iterations, convolutions), rho, **options)


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
    _normalization: set[nn.Parameter]

    @property
    def _target(self) -> str:
        return "parameter of a normalization layer"

    def _perturbs(self, parameter: Tensor) -> bool:
        return parameter in self._normalization and super()._perturbs(parameter)

    def _candidates(self) -> list[Candidate]:
        if self.model is not None:  # whose layers may be others than before
            self._normalization = normalization_parameters(self.model)
        return super()._candidates()


class GaussSAM(SharpnessAware):
    """GaussSAM (Figure 1's control): ε = ρ·e/‖e‖₂ with Gaussian e, at SAM's cost."""

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        super().__init__(base_optimizer, Gaussian(), rho, **options)


class ASAM(SharpnessAware):
    """ASAM (Kwon et al. 2021): ε = ρT²g/‖Tg‖ with T = |w| + η, which weights of another scale leave as it is.

    T is 1 for parameters of one dimension (biases, norms). The authors' code goes by names instead, and scales whatever
    is called "weight", those of norms too. Two passes; beside SAM's copy of the weights nothing is kept.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius, in units of T⁻¹ε; the paper's 0.5 is for CIFAR-10, and its 1.0 for CIFAR-100.
        eta: η ≥ 0, by which a weight of 0 is perturbed too; the paper's 0.01.
    """

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.5, *, eta: float = 0.01, **options: "Unpack[Options]"
    ) -> None:
        check_radius(eta, "eta")
        super().__init__(base_optimizer, L2(), rho, direction=Adaptive(eta), **options)


class VaSSO(SharpnessAware):
    """VaSSO (Li & Giannakis 2024): ε = ρd/‖d‖ with d ← (1−θ)d + θg, which damps the noise of a batch in ε.

    Two passes, and d: a float for every weight. d starts at 0, as in the paper; the authors' code starts at the first
    gradient. A GradScaler is refused, whose scales d would mix. A step whose descent raises has counted in d already,
    as taking it back would need a copy of d: run again, it counts twice.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the ℓ2 ball.
        theta: θ in (0, 1]; 1 is SAM. The paper's best values lie between 0.2 and 0.9.
    """

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, theta: float = 0.9, **options: "Unpack[Options]"
    ) -> None:
        check_between("theta", theta, 0, 1, low=False, high=True)
        super().__init__(base_optimizer, L2(), rho, direction=Averaged(theta), **options)


class FriendlySAM(SharpnessAware):
    """Friendly SAM (Li et al. 2024, CVPR): ε = ρd/‖d‖ with d = g − σm, m the running mean of gradients.

    What the mean has of the full gradient is taken out of ε, and the batch's own noise is left. m ← λm + (1−λ)g after
    its use; in the first step d = m = g. Two passes, and m: a float for every weight. A GradScaler is refused, whose
    scales m would mix. A step whose descent raises has counted in m already: run again, it counts twice.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the ℓ2 ball.
        sigma: σ ≥ 0; 0 is SAM. The paper's 1.
        lmbda: λ in [0, 1); the paper's 0.9.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **options: "Unpack[Options]",
    ) -> None:
        check_radius(sigma, "sigma")
        check_between("lmbda", lmbda, 0, 1, low=True, high=False)
        super().__init__(base_optimizer, L2(), rho, direction=Friendly(sigma, lmbda), **options)


class USAM(SharpnessAware):
    """USAM (Andriushchenko & Flammarion 2022): ε = ρg, not normalized, as much of the theory has it.

    Two passes, and SAM's copy of the weights. ε grows with the gradient: a GradScaler is refused, whose scale would be
    in it.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: factor on the gradient, in units of a learning rate.
    """

    def __init__(self, base_optimizer: Optimizer, rho: float = 0.05, **options: "Unpack[Options]") -> None:
        super().__init__(base_optimizer, Unnormalized(), rho, **options)


class SSAM(SharpnessAware):
    """SSAM (Mi et al. 2022; FSAM of Zhong et al. 2022 with sparsity 0.9): SAM's ε on the entries that matter most.

    Of all entries a share of 1 − s keeps its ε: those with the largest squared gradient, looked at anew every
    ``refresh`` steps. The norm is taken before the mask, so ‖ε‖ ≤ ρ. Two passes, and a byte for every weight. The
    paper sums squared gradients of single samples; here it is the squared gradient of the ascent's batch, which costs
    nothing.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the ℓ2 ball, before the mask.
        sparsity: s in [0, 1), the share without ε; 0 is SAM. The paper's 0.5 keeps SAM's accuracy.
        refresh: steps from mask to mask, at least 1; the paper takes an epoch.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        *,
        sparsity: float = 0.5,
        refresh: int = 100,
        **options: "Unpack[Options]",
    ) -> None:
        check_between("sparsity", sparsity, 0, 1, low=True, high=False)
        check_count("refresh", refresh, least=1)
        super().__init__(base_optimizer, L2(), rho, direction=Sparse(sparsity, refresh), **options)


class RWP(SharpnessAware):
    """RWP (Li et al. 2024): Gaussian noise, of every row as large as σ times the row; a single pass a step.

    A kernel's rows are its filters; a parameter of one dimension is one row. The noise is a sample's own, and the base
    optimizer steps with the gradient there. With ``mixture=λ`` (m-RWP) a second pass gives the gradient at the weights,
    and the step is λĝ + (1−λ)g; the authors take g from another batch, here it is of the same one.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        sigma: σ ≥ 0; the default of the param-group key ``"rho"``. The paper's 0.01.
        mixture: λ in [0, 1], or None for the noisy gradient alone. The paper's 0.5.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        sigma: float = 0.01,
        *,
        mixture: float | None = None,
        **options: "Unpack[Options]",
    ) -> None:
        if mixture is not None:
            check_between("mixture", mixture, 0, 1, low=True, high=True)
        combination = None if mixture is None else Weighted(mixture)
        super().__init__(
            base_optimizer, Unnormalized(), sigma, direction=RowNoise(), combination=combination, **options
        )


class GSAM(SharpnessAware):
    """GSAM (Zhuang et al. 2022): SAM's ε; the step is ĝ − αg⊥, g⊥ being what of g is orthogonal to ĝ.

    So the gap between the loss at the perturbed weights and that at the weights falls too. Norms and products are over
    all parameters together. Two passes, SAM's copy of the weights, and g: a float for every weight.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the ℓ2 ball. The authors let it follow the learning rate, see ``rho_schedule``.
        alpha: α ≥ 0; 0 is SAM. The paper's 0.4 is for ViT-S/16 on ImageNet.
    """

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, alpha: float = 0.4, **options: "Unpack[Options]"
    ) -> None:
        check_radius(alpha, "alpha")
        super().__init__(base_optimizer, L2(), rho, combination=SurrogateGap(alpha), **options)


class WSAM(SharpnessAware):
    """WSAM (Yue et al. 2023): SAM's ε; the step is g + γ/(1−γ)·(ĝ − g), which weighs sharpness against the loss.

    γ = 1/2 is SAM. Two passes, SAM's copy of the weights, and g: a float for every weight. The authors' code keeps the
    sharpness part out of the base optimizer's moments by default; here both go through them, as in its formula.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the ℓ2 ball.
        gamma: γ in [0, 1); the paper's 0.9.
    """

    def __init__(
        self, base_optimizer: Optimizer, rho: float = 0.05, *, gamma: float = 0.9, **options: "Unpack[Options]"
    ) -> None:
        check_between("gamma", gamma, 0, 1, low=True, high=False)
        super().__init__(base_optimizer, L2(), rho, combination=Weighted(gamma / (1 - gamma)), **options)


class LookSAM(SharpnessAware):
    """LookSAM (Liu et al. 2022): SAM every k-th step; in between one pass and the part of ĝ that g does not have.

    v = ĝ − ⟨ĝ,u⟩u with u = g/‖g‖ is kept from a SAM step, and g + α(‖g‖/‖v‖)v is what the base optimizer gets until
    the next. Norms and products are over all parameters together; the authors take them layer by layer for large
    batches. 1 + 1/k passes, and g and v: two floats for every weight. ``active`` says which kind the next step is.

    Args:
        base_optimizer: the optimizer that takes the step, already constructed.
        rho: radius of the ℓ2 ball.
        every: k ≥ 1, counted from the end of the delay; 1 is SAM. The paper's 5.
        alpha: α ≥ 0; the paper's 0.7.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        *,
        every: int = 5,
        alpha: float = 0.7,
        **options: "Unpack[Options]",
    ) -> None:
        check_count("every", every, least=1)
        check_radius(alpha, "alpha")
        super().__init__(base_optimizer, L2(), rho, combination=LookBack(every, alpha), **options)


for _method in (NuSAM, NuSAMNorm, ASAM, VaSSO, FriendlySAM, SSAM, RWP, GSAM, WSAM, LookSAM):
    for _name in signature(_method).parameters.keys() - dir(_method):
        refuse_setting(_method, _name)
