"""The installed wheel, beside torch and nothing else: import it and train with it."""

import importlib.util
import sys
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, about numpy
    import torch

import nusam

assert torch.__version__.startswith(sys.argv[1]), torch.__version__
assert "site-packages" in nusam.__file__, nusam.__file__
for extra in ("timm", "rich", "tyro", "matplotlib", "sklearn", "torchvision"):
    assert importlib.util.find_spec(extra) is None, extra

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
print(f"nusam {nusam.__version__} with torch {torch.__version__} alone: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
