"""The command ``nusam``."""

import importlib.util
import sys

__all__ = ["main"]

REQUIRED = ("matplotlib", "rich", "sklearn", "timm", "torchvision", "tyro")


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

    from nusam.experiments.demo import Demo
    from nusam.experiments.errors import Refused

    chosen = tyro.extras.subcommand_cli_from_dict({"demo": Demo}, prog="nusam", description="Experiments with νSAM.")
    try:
        return chosen()
    except Refused as refusal:
        return _refuse(str(refusal))


def _refuse(sentence: str) -> int:
    print(f"nusam: {sentence}", file=sys.stderr)
    return 2
