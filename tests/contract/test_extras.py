"""An integration whose framework is not installed says which extra to install."""

import importlib
import sys

import pytest


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


def test_the_core_imports_no_integration():
    """Imports run one way: an integration's framework must not be paid for by those who don't use it."""
    import subprocess

    script = "import sys, nusam; print([m for m in sys.modules if 'integrations' in m or 'lightning' in m])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
