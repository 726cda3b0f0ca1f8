"""``nusam find-rho``: a short sweep over ρ on data and a model of one's own, or on those of the experiments."""

import inspect
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nusam.experiments.commands.setups import imported
from nusam.experiments.errors import Refused
from nusam.experiments.files import alone_in, writing_to
from nusam.experiments.limits import at_least, not_negative, pixels_on_a_side, some_of
from nusam.experiments.training.data import Source, load
from nusam.experiments.training.devices import require_device
from nusam.experiments.training.methods import BASES
from nusam.experiments.training.methods import METHODS as KNOWN
from nusam.experiments.training.models import TITLES, require_fit

__all__ = ["FindRho"]

METHODS = ("nusam", "nusam-norm", "sam", "sam-on")
RHOS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)  # as nusam.find_rho tries them


@dataclass(frozen=True)
class FindRho:
    """Say by short trainings which ρ to take, and whether that helps.

    FILE.py:FUNCTION names a function without arguments that returns a dict with arguments of nusam.find_rho: model,
    base, loss, loader, validation, and score if the loss is not what counts; methods, radii, steps and seeds are
    options of this command.
    """

    setup: Annotated[str, tyro.conf.Positional] = ""
    """FILE.py:FUNCTION; without it, --model learns --data."""
    model: str = "mixer"
    """As of nusam train."""
    data: str = "digits"
    """As of nusam train."""
    data_root: Path = Path("data")
    """Folder of the data's files."""
    image_size: int = 0
    """As of nusam train."""
    base: str = "adamw"
    """Base optimizer: sgd, adam, adamw or adafactor."""
    learning_rate: float = 4e-3
    """At its highest."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")] = ("nusam", "sam")
    """nusam, nusam-norm, sam, sam-on."""
    rhos: Annotated[tuple[float, ...], tyro.conf.arg(metavar="RHO ...")] = RHOS
    """Radii that are tried with every method, and no others; of the default, further ones until the best has worse
    neighbours."""
    ascent_share: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARE ...")] = (1.0,)
    """Of each batch, that the ascents see; several are all tried."""
    one_pass: bool = False
    """Let each step's ascent ride in the descent before it (nusam and nusam-norm)."""
    steps: int = 200
    """Of each training."""
    seeds: int = 2
    """Trainings of every method and radius."""
    confirm: int = 4
    """Further seeds, on which the best is compared with the base optimizer in as many steps and in as many seconds; 0
    is no verdict."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ...; where the model of a setup lies is its own business."""
    out: Path = Path("runs/find-rho")
    """Folder for rho.png, rho.json and best.pt, the weights and the optimizer of the best training."""

    def __call__(self) -> int:
        """Run it; the exit code."""
        self._check()
        with writing_to(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        given = _of_user(self.setup) if self.setup else self._source()
        from nusam.experiments.commands.rho_search import RhoSearch, built_in

        if isinstance(given, Source):
            print(given.told)
            given = built_in(given, self.model, self.base, self.learning_rate, self.device)
        search = RhoSearch(
            self.methods,
            None if self.rhos == RHOS else self.rhos,
            self.ascent_share,
            self.one_pass,
            self.steps,
            self.seeds,
            self.confirm,
            self.out,
        )
        with alone_in(self.out):
            return search.run(given)

    def _source(self) -> Source:
        """What --model learns from, where that is possible."""
        for option, allowed in (("model", TITLES), ("base", BASES)):
            if getattr(self, option) not in allowed:
                raise Refused(f"--{option} must be one of {', '.join(allowed)}, got {getattr(self, option)}.")
        not_negative(learning_rate=self.learning_rate)
        require_device(self.device)
        source = load(self.data, self.data_root, image_size=self.image_size)
        require_fit(self.model, source.image_size, source.channels)
        return source

    def _check(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise Refused(f"--methods must name some of {', '.join(METHODS)}, got {method}.")
            if self.one_pass and not KNOWN[method].low_rank:
                raise Refused(f"--one-pass is for nusam and nusam-norm, got {method}; name other --methods.")
        for rho in self.rhos:
            if not (math.isfinite(rho) and rho >= 0):
                raise Refused(f"rho must be a finite number of at least 0, got {rho}.")
            not_negative(rho=rho)
        for share in self.ascent_share:
            some_of(ascent_share=share)
        at_least(1, steps=self.steps, seeds=self.seeds)
        at_least(0, confirm=self.confirm)
        pixels_on_a_side(image_size=self.image_size)
        if self.confirm == 1:
            raise Refused("--confirm must be 0 or at least 2, got 1, which has no interval; give 4 or more.")


def _of_user(setup: str) -> dict[str, Any]:
    """What the named function returns."""
    path, _, name = setup.rpartition(":")
    if not path or not Path(path).is_file():
        raise Refused(f"SETUP must be FILE.py:FUNCTION with a file that exists, got {setup}.")
    if Path(path).suffix != ".py":
        raise Refused(f"SETUP must name a Python file, got {path}.")
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        module = imported(Path(path))
    except SyntaxError as error:
        raise Refused(f"{error.filename}, line {error.lineno}, is no Python ({error.msg}); mend it.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise Refused(f"{path} has no function {name}; name one that returns the arguments of nusam.find_rho.")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise Refused(f"{setup} must take no arguments ({error}); give them defaults.") from error
    given = function()
    needed = {"model", "base", "loss", "loader", "validation"}
    if not isinstance(given, dict) or not needed <= given.keys() <= needed | {"score", "delay", "warm_up"}:
        has = ", ".join(given) if isinstance(given, dict) else type(given).__name__
        raise Refused(
            f"{setup} must return a dict with {', '.join(sorted(needed))}, and perhaps score, delay or warm_up, got "
            f"{has}."
        )
    return given
