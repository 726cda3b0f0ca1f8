"""The command ``nusam``."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["main"]

REQUIRED = (
    *("jinja2", "markdown_it", "matplotlib", "plotly", "rich", "scipy", "sklearn"),
    *("tensorboard", "timm", "torchvision", "tyro"),
)


def main() -> None:
    """Run a subcommand. Exit codes: 0 done, 2 refused, 130 interrupted."""
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> int:
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f'nusam needs {", ".join(missing)} for its experiments; pip install "nusam[experiments]".')
    import tyro

    from nusam.experiments.commands.demo import Demo
    from nusam.experiments.commands.find_rho import FindRho
    from nusam.experiments.commands.memory import Memory
    from nusam.experiments.commands.report import Report
    from nusam.experiments.commands.reproduce import Reproduce
    from nusam.experiments.commands.sweep import Sweep
    from nusam.experiments.commands.train import Train
    from nusam.experiments.errors import Refused

    commands: dict[str, Callable[..., Any]] = {
        "demo": Demo,
        "train": Train,
        "sweep": Sweep,
        "reproduce": Reproduce,
        "memory": Memory,
        "report": Report,
        "find-rho": FindRho,
    }
    chosen = tyro.extras.subcommand_cli_from_dict(commands, prog="nusam", description="Experiments with νSAM.")
    try:
        return int(chosen())
    except Refused as refusal:
        return _refuse(str(refusal))


def _refuse(sentence: str) -> int:
    print(f"nusam: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
