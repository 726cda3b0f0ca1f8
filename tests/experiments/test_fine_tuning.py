"""Pretrained weights are named by what they are, and pretrained models are shown images of the size they know."""

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console

from nusam.experiments.errors import Refused
from nusam.experiments.recipes.experiment import Bench
from nusam.experiments.recipes.fine_tuning import fine_tuning_settings
from nusam.experiments.runs.store import Store
from nusam.experiments.training import loop
from nusam.experiments.training.building import build


@pytest.fixture
def bench(tmp_path):
    return Bench(Store(tmp_path), "smoke", "digits-28", tmp_path, 1, torch.device("cpu"), Console(quiet=True))


def _pretrained(bench):
    (setting,) = fine_tuning_settings(bench)
    return setting.pretrained


def test_runs_from_other_weights_are_other_runs(bench):
    name = _pretrained(bench)
    path = bench.store.weights(name)
    assert _pretrained(bench) == name

    path.unlink()  # lost, and trained anew: the same weights on the same machine
    assert _pretrained(bench) == name

    weights = torch.load(path)
    weights["stem.proj.bias"][0] += 1e-6
    torch.save(weights, path)
    other = _pretrained(bench)
    assert other != name
    assert bench.store.weights(other) == path


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut"])
def test_weights_that_cant_be_read_are_refused(bench, content):
    path = bench.store.weights(_pretrained(bench))
    path.write_bytes(content)
    with pytest.raises(Refused, match=r"holds no weights that can be read; remove it"):
        _pretrained(bench)


@pytest.mark.parametrize("threads", [1, 2])
def test_pretraining_takes_one_thread_whatever_the_machine_has(bench, monkeypatch, threads):
    seen = []

    def train(*arguments, keep, **options):
        seen.append(torch.get_num_threads())
        keep.parent.mkdir()
        torch.save({}, keep)

    monkeypatch.setattr(loop, "train", train)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _pretrained(bench)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.fixture
def offline(monkeypatch):
    """timm's models with random weights in the place of those of the hub; what it made."""
    made = []
    create = timm.create_model

    def created(name, pretrained, **options):
        assert pretrained
        made.append(create(name, pretrained=False, **options))
        weights = create(name, pretrained=False).state_dict()
        own = made[-1].state_dict()
        made[-1].load_state_dict({k: w if w.shape == own[k].shape else own[k] for k, w in weights.items()})
        return made[-1]

    monkeypatch.setattr(timm, "create_model", created)
    return made


@pytest.mark.parametrize(
    ("name", "tokens"), [("vit-s/16", "pos_embed"), ("mixer-b/16", "blocks.0.mlp_tokens.fc1.weight")]
)
def test_a_pretrained_model_sees_all_its_patches_of_a_small_image(offline, name, tokens):
    model = build(name, 32, 3, 10).eval()
    assert model.state_dict()[tokens].shape[1] in (196, 197)  # as the hub's weights have it
    seen = []
    patches = model.patch_embed if name.startswith("vit") else model.stem
    patches.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        given = model(torch.randn(1, 3, 32, 32))
    assert given.shape == (1, 10)
    assert seen == [196]
    assert offline == [model]


def test_a_large_image_is_seen_as_it_is(offline):
    model = build("vit-s/16", 224, 3, 10).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(images), model.forward_head(model.forward_features(images)))


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("not in the cache"), ConnectionError("reset")])
def test_the_network_is_blamed_for_its_own_errors(monkeypatch, error):
    def create(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(Refused, match="connect to the network once"):
        build("mixer-b/16", 32, 3, 10)


def test_the_network_is_not_blamed_for_weights_that_do_not_fit(monkeypatch):
    def create(*_, **__):
        raise RuntimeError("size mismatch for blocks.0.mlp_tokens.fc1.weight")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(RuntimeError, match="size mismatch"):
        build("mixer-b/16", 32, 3, 10)
