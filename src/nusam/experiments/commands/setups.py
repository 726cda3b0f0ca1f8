"""Files of users as modules, each by a name that nothing else has and that any process can import.

So a spawned loader worker unpickles what is defined in them, and nobody's ``import random`` finds a user's random.py.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, unquote

__all__ = ["imported"]

__path__: list[str] = []  # as a package, whose modules lie anywhere


def imported(path: Path) -> ModuleType:
    """The file, run anew."""
    name = f"{__name__}.{quote(str(path.resolve()), safe='').replace('.', '%2E')}"
    sys.modules.pop(name, None)
    return import_module(name)


class _ByPath(MetaPathFinder):
    """Finds a module by the path that its name is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return spec_from_file_location(fullname, unquote(name)) if package == __name__ else None


sys.meta_path.append(_ByPath())
