"""The names of models that timm and transformers know, read from their sources, as it takes long to import them."""

import difflib
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from nusam.experiments.errors import Refused

__all__ = ["DEFAULTS_OF", "require_known", "timm_models", "unknown"]

DEFAULTS_OF = {"bert-base-uncased": "bert", "gpt2": "gpt2"}  # models that their configuration's defaults describe


def require_known(name: str) -> None:
    """Refuse a name that is mentioned in neither package; whether they know one that is, is theirs to say."""
    if (Path(name) / "config.json").is_file():
        return
    known = timm_models()
    if not known:  # another way to keep models, which this can't read
        return
    model = name.partition(".")[0]  # without the tag of its weights
    if model not in known and not _quotes("timm", model) and not _quotes("transformers", DEFAULTS_OF.get(name, name)):
        raise unknown(name, known)


def unknown(name: str, models: Iterable[str]) -> Refused:
    """The sentence about a name, with the one of timm's models that was perhaps meant."""
    close = difflib.get_close_matches(name, models, 1)
    return Refused(
        f"NAME must be a timm model, a transformers model type such as bert, or a folder with a transformers "
        f"config.json, got {name}" + (f"; did you mean {close[0]}?" if close else "; choose from timm.list_models().")
    )


def timm_models() -> list[str]:
    """Its models' names, in order."""
    return sorted(re.findall(r"^@register_model\ndef (\w+)\(", _text("timm"), flags=re.MULTILINE))


def _quotes(package: str, name: str) -> bool:
    return re.search(rf"['\"]{re.escape(name)}['\"]", _text(package)) is not None


def _text(package: str) -> str:
    """The sources in which a package keeps its models' names."""
    found = find_spec(package)
    folder = {"timm": "models", "transformers": "models/auto"}[package]
    places = [] if found is None else found.submodule_search_locations or []
    return "\n".join(path.read_text("utf-8") for place in places for path in sorted(Path(place, folder).glob("*.py")))
