"""Rooms and files of the package: imports run one way, and nothing grows until nobody reads it."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest

import nusam

ROOT = Path(nusam.__file__).parent
# From the ground up; what stands in one line may import from the lines below it, and from its own room.
STOREYS = [
    {"containers"},
    {"packed"},
    {"interrupts", "power_iteration", "base_optimizer", "batch", "reference", "uncompiled"},
    {"norms"},
    {"lmo"},
    {"directions", "combinations"},
    {"distributed"},
    {"layers"},
    {"guards"},
    {"placement"},
    {"both_gradients"},
    {"wrapper", "coverage"},
    {"targets", "saving"},
    {"ascent"},
    {"resuming"},
    {"overlaps", "placing"},
    {"refusals"},
    {"two_passes"},
    {"stepping"},
    {"one_pass"},
    {"optimizer"},
    {"methods", "perturbation"},
    {"tools"},
    {"integrations", "jax"},
    {"experiments"},
]
FILE, CLASS = 350, 250  # lines


def modules():
    """Of every module its path below the package, its lines and its syntax tree."""
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text("utf-8")
        yield path.relative_to(ROOT), source.count("\n"), ast.parse(source)


def room(name):
    """The storey on which a module or package right below ``nusam`` stands; None for ``nusam`` itself."""
    return next((i for i, names in enumerate(STOREYS) if name in names), None)


def imports(tree):
    """The parts of the names of nusam's modules that are imported anywhere, also late."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nusam":
            yield node.module.split(".")[1:]


def test_every_module_has_its_storey():
    names = {path.parts[0].removesuffix(".py") for path, _, _ in modules()} - {"__init__"}
    assert names == set().union(*STOREYS)
    assert all(not (lower & upper) for lower, upper in pairwise(STOREYS))


def test_no_import_runs_upward():
    upward = [
        (str(path), ".".join(name))
        for path, _, tree in modules()
        for name in imports(tree)
        if name and path.parts[0] != "__init__.py" and path.parts[0].removesuffix(".py") != name[0]
        if room(path.parts[0].removesuffix(".py")) <= room(name[0])
    ]
    assert not upward


def test_no_imports_go_round_in_a_circle():
    graph = {}
    for path, _, tree in modules():
        own = ".".join(path.with_suffix("").parts)
        graph[own] = {".".join(name) for name in imports(tree)}
    left = dict(graph)
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("kind", ["files", "classes"])
def test_nothing_grows_until_nobody_reads_it(kind):
    if kind == "files":
        long = {str(path): lines for path, lines, _ in modules() if lines > FILE}
    else:
        long = {
            node.name: node.end_lineno - node.lineno + 1
            for _, _, tree in modules()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= CLASS
        }
    assert not long


EXPERIMENTS = [{"errors", "files", "limits"}, {"training"}, {"runs"}, {"pages"}, {"recipes"}, {"commands"}]


def test_no_import_of_the_experiments_runs_upward():
    storeys = {name: i for i, names in enumerate(EXPERIMENTS) for name in names}
    own = [(path.parts[1:], tree) for path, _, tree in modules() if path.parts[0] == "experiments" and path.parts[1:]]
    rooms = {parts[0].removesuffix(".py") for parts, _ in own} - {"__init__"}
    assert rooms == storeys.keys()
    upward = [
        ("/".join(parts), ".".join(name))
        for parts, tree in own
        for name in imports(tree)
        if name[:1] == ["experiments"] and len(name) > 1 and parts[0] not in (name[1], "__init__.py")
        if storeys[parts[0].removesuffix(".py")] < storeys[name[1]]
    ]
    assert not upward
