"""The installed wheel, beside torch and nothing else: what it brought, how long it takes to import, and a training.

python core_only.py TORCH_VERSION FILE_WITH_WHAT_WAS_INSTALLED_BEFORE
"""

import importlib
import importlib.util
import subprocess
import sys
import warnings
from importlib.metadata import distribution, distributions
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, about numpy
    import torch

import nusam

assert torch.__version__.startswith(sys.argv[1]), torch.__version__
assert "site-packages" in nusam.__file__, nusam.__file__

wheel = distribution("nusam")
required = [requirement for requirement in wheel.requires or () if "extra ==" not in requirement]
assert [requirement.partition(">=")[0] for requirement in required] == ["torch"], required
assert nusam.__version__ == wheel.version, (nusam.__version__, wheel.version)
before = set(Path(sys.argv[2]).read_text().split())
brought = {found.metadata["Name"] for found in distributions()} - before
assert brought == {"nusam"}, brought
for extra in ("timm", "rich", "tyro", "matplotlib", "sklearn", "torchvision"):
    assert importlib.util.find_spec(extra) is None, extra

for extra in ("lightning", "transformers", "accelerate", "timm"):
    said = "nothing, it was imported without its framework"
    try:
        importlib.import_module(f"nusam.integrations.{extra}")
    except ImportError as error:
        said = str(error)
    assert f'pip install "nusam[{extra}]"' in said, (extra, said)

asked = """
import sys, time
import nusam
assert "torch" not in sys.modules
import torch
before, start = set(sys.modules), time.perf_counter()
from nusam import *
print(time.perf_counter() - start, *{name.partition(".")[0] for name in set(sys.modules) - before})
"""
seconds, *packages = subprocess.check_output([sys.executable, "-W", "ignore", "-c", asked], text=True).split()
assert set(packages) - sys.stdlib_module_names <= {"nusam", "torch"}, packages

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
x = torch.randn(64, 4)
y = x[:, :1] * x[:, 1:2]
opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.01, model=model)
losses = []
for _ in range(200):
    for _ in opt.passes():
        loss = (model(x) - y).square().mean()
        loss.backward()
    opt.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 4, losses[::50]
print(
    f"nusam {nusam.__version__} with torch {torch.__version__} alone, imported in {float(seconds):.2f} s: "
    f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
)
