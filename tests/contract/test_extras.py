"""An integration whose framework is not installed says which extra to install."""

import ast
import importlib
import re
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("integration", "framework"),
    [
        ("lightning", "pytorch_lightning"),
        ("transformers", "transformers"),
        ("transformers", "accelerate"),
        ("accelerate", "accelerate"),
        ("timm", "timm"),
    ],
)
def test_the_import_error_names_the_extra(integration, framework, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == framework or name.startswith("nusam.integrations."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf'pip install "nusam\[{integration}\]"\.$') as caught:
        importlib.import_module(f"nusam.integrations.{integration}")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("extra", ["lightning", "fabric", "transformers", "accelerate", "timm"])
def test_what_an_example_imports_is_what_the_page_says_to_install(extra):
    tree = ast.parse((ROOT / "examples" / f"train_{extra}.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = packages_distributions()
    needed = {packages[name.split(".")[0]][0].lower() for name in found if name.split(".")[0] in packages}
    extras = ("lightning" if extra == "fabric" else extra, "experiments")  # pytorch-lightning brings Fabric
    lines = [line for line in requires("nusam") if line.rstrip("'\"").endswith(extras)]
    brought = {re.split(r"[^\w-]", line)[0].lower() for line in lines}
    assert needed - brought <= {"nusam", "torch", "lightning-fabric"}


def test_the_core_imports_no_integration():
    """Imports run one way: an integration's framework must not be paid for by those who don't use it."""
    import subprocess

    script = "import sys; from nusam import *; print('nusam.methods' in sys.modules, "
    script += "[m for m in sys.modules if 'integrations' in m or 'lightning' in m])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "True []"
