"""The command ``nusam``, for processes that are forked when all that it trains with is there."""

import nusam.experiments.training.loop  # noqa: F401
from nusam.experiments.commands.main import main

__all__ = ["main"]
