"""Every public part of nusam in one small training, written for a strict type check.

python examples/typed_loop.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nusam
from nusam.combinations import SurrogateGap
from nusam.directions import Averaged
from nusam.lmo import L2, LMO, Dense, Epsilon, State


class Blockwise(LMO):
    """Every parameter on the ℓ2 sphere of radius ρ by itself."""

    def __call__(
        self, gradients: Sequence[Tensor], radii: Sequence[float], states: Sequence[State], seed: int
    ) -> list[Epsilon]:
        """ε of each parameter; 0 where its gradient is zero or not finite."""
        return [self._on_sphere(gradient, radius) for gradient, radius in zip(gradients, radii, strict=True)]

    def _on_sphere(self, gradient: Tensor, radius: float) -> Dense:
        epsilon = (gradient * (radius / gradient.norm())).nan_to_num(0, 0, 0)
        return Dense(epsilon, epsilon.norm())


def batches() -> list[tuple[Tensor, Tensor]]:
    """Which of four numbers is the largest."""
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    y = x[:, :4].argmax(1)
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 512, 32)]


def network() -> nn.Sequential:
    """Two matrices, two biases and a normalization layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return cross_entropy(model(x), y)


def train(model: nn.Module, opt: nusam.SharpnessAware, epochs: int = 8) -> float:
    """A loop over the passes; the last loss at the unperturbed weights."""
    first = float("nan")
    for _ in range(epochs):
        for batch in batches():
            for name in opt.passes():
                loss = loss_of(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                if name == "ascent":
                    first = loss.item()
            opt.step()
    return first


def train_by_closure(model: nn.Module, opt: nusam.SharpnessAware) -> float:
    """The same by torch's closure contract."""
    last = float("nan")
    for batch in batches():

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            return loss

        loss: Tensor = opt.step(closure)
        last = loss.item()
    return last


def main() -> None:
    model = network()
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    opt = nusam.NuSAM(base, rho=0.02, model=model, delay=4, power_iterations=2, rho_schedule=lambda k: (k + 1) ** -0.1)
    floats: int = nusam.perturbation_numel(model)
    assert floats == opt.perturbation_numel() == nusam.perturbation_numel(model, nusam.NuSAMNorm)
    reach: nusam.Coverage = opt.coverage()
    print(f"νSAM perturbs {reach.share:.0%} of {reach.trainable} entries, all but {', '.join(reach.left_out)}")
    print(f"{floats} floats of ε, loss {train(model, opt):.3f}")
    print(f"going on by closure: loss {train_by_closure(model, opt):.3f}")
    metrics: dict[str, float] = opt.metrics()
    print(f"active {opt.active}, ρ {metrics['rho']:.3f}, σ of the first matrix {metrics['sigma/0.weight']:.3f}")

    found: nusam.Sharpness = nusam.sharpness(model, lambda model: loss_of(model, batches()[0]), rho=0.05)
    print(f"worst increase: {found.l2:.3f} in the ℓ2 ball, {found.nuclear:.3f} in the nuclear; λ {found.hessian:.1f}")

    custom = network()
    ball = nusam.SharpnessAware(torch.optim.SGD(custom.parameters(), lr=0.3), Blockwise(), rho=0.01)
    print(f"a ball of one's own: loss {train(custom, ball):.3f}")

    for method in (nusam.ASAM, nusam.FriendlySAM, nusam.GSAM, nusam.SSAM, nusam.USAM, nusam.VaSSO, nusam.WSAM):
        other = network()
        print(
            f"{method.__name__}: loss {train(other, method(torch.optim.SGD(other.parameters(), lr=0.3), rho=0.02)):.3f}"
        )
    noisy = network()
    noise = nusam.RWP(torch.optim.SGD(noisy.parameters(), lr=0.3), sigma=0.02, mixture=0.5)
    print(f"random weights, mixed: loss {train(noisy, noise):.3f}")
    sparing = network()
    seldom = nusam.LookSAM(torch.optim.SGD(sparing.parameters(), lr=0.3), rho=0.02, every=4)
    print(f"an ascent in every fourth step: loss {train_by_closure(sparing, seldom):.3f}")
    own = nusam.SharpnessAware(
        torch.optim.SGD(network().parameters(), lr=0.3),
        L2(),
        0.02,
        direction=Averaged(0.5),
        combination=SurrogateGap(0.2),
    )
    print(f"an average, and a surrogate gap: {type(own.direction).__name__}, {type(own.combination).__name__}")

    lean = network()
    frugal = nusam.NuSAM(torch.optim.AdamW(lean.parameters(), lr=3e-3), model=lean, ascent="matrix-free")
    nusam.step_in_backward(frugal)
    print(f"step in backward: loss {train(lean, frugal):.3f}")

    driven = network()
    engine = torch.optim.AdamW(driven.parameters(), lr=3e-3)  # stands for one that keeps its step to itself
    perturbation = nusam.Perturbation(driven, rho=0.05, ascent_share=0.5)
    for batch in batches():
        for part in perturbation.passes(batch):
            loss_of(driven, part).backward()  # type: ignore[no-untyped-call]
        engine.step()
        engine.zero_grad()
    norms = {name: value for name, value in perturbation.metrics().items() if name.startswith("epsilon/")}
    print(f"an engine's step: {norms}")

    search: nusam.RadiusSearch = nusam.find_rho(
        network(),
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_of,
        batches()[:12],
        batches()[12:],
        methods=[nusam.NuSAM, nusam.SAM],
        rhos=[0.01, 0.1],
        steps=24,
        seeds=1,
    )
    suggested: dict[str, float] = search.suggestions
    print(f"suggested ρ: {suggested}")


if __name__ == "__main__":
    main()
