"""An extension for griffe: the docstrings' roles and literal blocks, as Markdown has them."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr):`~?\.?([\w.]+)`")


class DocstringRoles(griffe.Extension):
    """``:meth:`metrics``` becomes a link where the API reference has an entry, and code elsewhere."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda match: _link(obj, match[1]), obj.docstring.value)
            obj.docstring.value = re.sub(r"::(?=\n\n    )", ":", text)


def _link(obj: griffe.Object, name: str) -> str:
    scope: Any = obj
    while scope is not None and not name.startswith("nusam."):
        if name.split(".")[0] in scope.members:
            name = f"{scope.path}.{name}"
        scope = scope.parent
    return f'<autoref identifier="{name}" optional><code>{name.rpartition(".")[2]}</code></autoref>'
