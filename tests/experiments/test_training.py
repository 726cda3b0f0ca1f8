"""Runs are reproducible, and methods are compared on the same footing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

import nusam
from nusam.experiments.training.building import build
from nusam.experiments.training.data import load
from nusam.experiments.training.loop import train
from nusam.experiments.training.methods import METHODS
from nusam.experiments.training.models import SMALL
from nusam.experiments.training.spec import Recipe, Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load("digits", tmp_path_factory.mktemp("unused"))


def epochs(run: Run, recipe: Recipe, source) -> list:
    """The reported epochs, which are also the outcome's."""
    reported = []
    outcome = train(run, recipe, source, CPU, reported.append)
    assert outcome.epochs == reported
    return reported


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_result(method, digits):
    run = Run("vit", method, 0.0 if method == "adamw" else 0.05, seed=3)
    torch.manual_seed(1)
    first = epochs(run, Recipe(epochs=2), digits)
    torch.manual_seed(2)
    assert epochs(run, Recipe(epochs=2), digits) == first
    assert epochs(Run(run.model, run.method, run.rho, seed=4), Recipe(epochs=2), digits) != first


@pytest.mark.parametrize("method", ["sam", "nusam"])
def test_methods_share_split_weights_and_order_until_the_delay_is_over(method, digits):
    recipe = Recipe(epochs=10)  # the delay of 10% is the first epoch
    alone = epochs(Run("mixer", "adamw", 0.0, seed=1), recipe, digits)
    perturbed = epochs(Run("mixer", method, 0.1, seed=1), recipe, digits)
    assert perturbed[0] == alone[0]
    assert perturbed[1] != alone[1]


def test_a_runs_seed_reaches_its_warm_starts():
    starts = []
    for number in (0, 1, 0):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        run = Run("mixer", "nusam", 0.1, number)
        opt = METHODS["nusam"].wrap(torch.optim.SGD(model.parameters(), lr=0.1), run, 10, model)
        starts.append(opt.state_dict()["state"][0]["nusam_u"])
    assert torch.equal(starts[0], starts[2])
    assert not torch.allclose(starts[0], starts[1])


def test_training_learns(digits):
    learned = train(Run("mixer", "nusam", 0.05, seed=0), Recipe(epochs=15), digits, CPU, lambda epoch: None)
    assert learned.test_accuracy > 0.7
    assert learned.validation_accuracy > 0.7
    assert learned.epochs[-1].train_loss < learned.epochs[0].train_loss / 2
    assert learned.delay_steps == 15


def test_scoring_fewer_epochs_changes_nothing_else(digits):
    run = Run("mixer", "nusam", 0.05, seed=0)
    recipe = Recipe(epochs=5, validates_epochs=True)
    every = train(run, recipe, digits, CPU, lambda epoch: None)
    some = train(run, replace(recipe, scored_every=2), digits, CPU, lambda epoch: None)
    scored = (2, 4, 5)
    assert some.test_accuracies == {number: every.test_accuracies[number] for number in scored}
    assert [epoch.train_loss for epoch in some.epochs] == [epoch.train_loss for epoch in every.epochs]
    best = max(scored, key=lambda number: every.epochs[number - 1].validation_accuracy)
    assert some.accuracy_at_best == every.test_accuracies[best]
    assert some.test_accuracy == every.test_accuracy


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "adamw"])
def test_floats_of_the_perturbation_are_those_of_the_model(model, method, digits):
    outcome = train(Run(model, method, 0.05, seed=0), Recipe(epochs=1), digits, CPU, lambda epoch: None)
    net = build(model, digits.image_size, digits.channels, digits.classes)
    expected = {"sam": nusam.SAM, "gauss": nusam.GaussSAM, "sam-on": nusam.SAMON}.get(method, nusam.NuSAM)
    assert outcome.perturbation_numel == nusam.perturbation_numel(net, expected)


def test_a_collapsed_run_is_reported_not_hidden(digits):
    outcome = train(Run("vit", "nusam", 1e6, seed=0), Recipe(epochs=2), digits, CPU, lambda epoch: None)
    assert outcome.test_accuracy < 0.2
    assert math.isnan(outcome.epochs[-1].train_loss) or outcome.epochs[-1].train_loss > 1


PAPER = {"vit-s/4": (384, 12), "vit-b/4": (768, 12), "mixer-s/4": (512, 8), "mixer-b/4": (768, 12)}


def test_models_of_the_paper_have_its_widths_and_depths():
    """Table 6, on the meta device."""
    with torch.device("meta"):
        shapes = {name: build(name, 32, 3, 10) for name in PAPER}
    widths = {
        name: (model.embed_dim if "vit" in name else model.stem.proj.out_features, len(model.blocks))
        for name, model in shapes.items()
    }
    assert widths == PAPER
    assert shapes["vit-s/4"].patch_embed.num_patches == 64
    assert shapes["mixer-s/4"].blocks[0].mlp_tokens.fc1.in_features == 64  # patches


def perturbed(name):
    """By name, what νSAM perturbs, and all other parameters of more than one dimension."""
    with torch.device("meta"):
        model = build(name, 32, 3, 10)
    left = nusam.NuSAM(torch.optim.SGD(model.parameters()), model=model).coverage().left_out.keys()
    dense = {key for key, p in model.named_parameters() if p.dim() > 1}
    return dense - left, dense & left


@pytest.mark.parametrize("name", ["mixer", "mixer-s/4", "mixer-b/4"])
def test_every_weight_of_a_mixer_is_perturbed_and_its_patch_embedding_too(name):
    whole, left = perturbed(name)
    assert "stem.proj.weight" in whole
    assert left == set()
    with torch.device("meta"):
        model = build(name, 32, 3, 10)
    by_hand = sum(
        p.shape[0] + p.shape[1] for key, p in model.named_parameters() if key.endswith("weight") and p.dim() == 2
    )
    assert nusam.perturbation_numel(model) == by_hand


@pytest.mark.parametrize("name", ["vit", "vit-s/4", "vit-b/4"])
def test_a_vit_is_perturbed_as_the_paper_counts(name):
    whole, left = perturbed(name)
    assert {key for key in whole if ".0." in key or "blocks" not in key} == {
        *(f"blocks.0.{layer}.weight" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "head.weight",
    }
    assert left == {"cls_token", "pos_embed", "patch_embed.proj.weight"}


def test_what_was_there_before_is_kept_under_names_of_its_own():
    assert perturbed("mixer-conv")[1] == {"stem.proj.weight"}
    assert perturbed("vit-mean")[1] == {"pos_embed", "patch_embed.proj.weight"}


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_a_patch_embedding_is_the_convolution_of_its_patches(size, channels):
    stem = build("mixer", size, channels, 10).stem
    images = torch.randn(3, channels, size, size)
    side = stem.size[0]
    kernel = stem.proj.weight.view(-1, channels, side, side)
    tokens = conv2d(images, kernel, stem.proj.bias, stride=side).flatten(2).mT
    assert torch.allclose(stem(images), tokens, atol=1e-5)


@pytest.mark.parametrize(("name", "reads_one"), [("vit", True), ("vit-mean", False)])
def test_the_head_of_a_vit_reads_the_class_token(name, reads_one, digits):
    model = build(name, digits.image_size, digits.channels, digits.classes).eval()
    nn.init.normal_(model.head.weight)
    tokens = torch.randn(2, 17 if reads_one else 16, 64)
    others = tokens.clone()
    others[:, 1:] += torch.randn_like(others[:, 1:])
    assert torch.equal(model.forward_head(tokens), model.forward_head(others)) == reads_one


def test_one_pass_learns_as_two_do(digits):
    recipe = Recipe(epochs=12)
    run = Run("mixer", "nusam", 0.05, seed=0, ascent_share=1 / 8)
    outcomes = [train(replace(run, one_pass=rides), recipe, digits, CPU, lambda epoch: None) for rides in (False, True)]
    two, one = outcomes
    assert one.epochs[0] == two.epochs[0]  # the delay
    assert one.epochs != two.epochs
    assert abs(one.test_accuracy - two.test_accuracy) < 0.1
    assert one.test_accuracy > 0.7
