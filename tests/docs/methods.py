"""The table of methods: ``python -m tests.docs.methods`` makes it from the classes, and writes docs/methods.md."""

import itertools
import re
from pathlib import Path

import torch
from torch import nn

import nusam

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- methods, generated -->", "<!-- end of the methods -->"
METHODS = (
    nusam.NuSAM,
    nusam.NuSAMNorm,
    nusam.SAM,
    nusam.SAMON,
    nusam.GaussSAM,
    nusam.ASAM,
    nusam.VaSSO,
    nusam.FriendlySAM,
    nusam.USAM,
    nusam.SSAM,
    nusam.RWP,
    nusam.GSAM,
    nusam.WSAM,
    nusam.LookSAM,
)
STEPS = 20


def row(method: type[nusam.SharpnessAware]) -> str:
    """What a method is and costs, counted on a small network."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64, bias=False), nn.Linear(64, 64, bias=False))
    opt = method(torch.optim.SGD(model.parameters(), lr=0.0), model=model)  # type: ignore[call-arg]
    passes = itertools.count()
    x = torch.randn(8, 64)
    for _ in range(STEPS):
        for _ in opt.passes():
            next(passes)
            model(x).square().mean().backward()
        opt.step()
    (what, *_) = (method.__doc__ or "").split("\n")
    what = re.sub(":class:`(.*?)`", r"`\1`", what).replace("|", "\\|")
    cells = (
        f"[`{method.__name__}`][nusam.{method.__name__}]",
        what,
        f"{next(passes) / STEPS:g}",
        _floats(opt),
        _needs(opt),
    )
    return f"| {' | '.join(cells)} |"


def _floats(opt: nusam.SharpnessAware) -> str:
    if isinstance(opt.lmo, nusam.lmo.Nuclear):
        return "Σ(n+m)"
    if isinstance(opt, nusam.SAMON):
        return "those of the norms"
    entries = sum(parameter.numel() for parameter in opt._parameters())
    kept = sum(value.numel() * value.element_size() / 4 for s in opt._states.values() for value in s.values())
    total = (opt.perturbation_numel() + kept) / entries + (opt.combination is not None)
    return f"{round(total, 2):g} N"


def _needs(opt: nusam.SharpnessAware) -> str:
    needs = []
    if isinstance(opt, nusam.SAMON):
        needs.append("`model=`")
    if not (opt.lmo.sees_shards and opt.direction.sees_shards):
        needs.append("whole parameters: no FSDP2, no tensor parallelism")
    if opt.direction.sees_scale or (isinstance(opt.lmo, nusam.lmo.Unnormalized) and opt.direction.needs_gradient):
        needs.append("gradients without a loss scale: no `GradScaler`")
    if opt.combination is not None:
        needs.append("both gradients of the same samples: no `m_sam`, no `ascent_share`")
    return "; ".join(needs)


def table() -> str:
    head = "| method | what it does | passes | floats | needs |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *map(row, METHODS)])


def page(text: str) -> str:
    """The page with the table as it is now."""
    return re.sub(f"(?<={BEGIN}\n).*(?={END})", lambda _: f"\n{table()}\n\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
