"""For mkdocstrings: the roles of docstrings, such as :func:`name`, as links to this reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

PACKAGE = "reparam_fused"
ROLE = re.compile(r":(?:func|meth|class):`([\w.]+)`")
#: Where a name of the package is documented, if it is not there itself
HOMES = {
    "Normal": f"{PACKAGE}.Normal",
    "rsample": f"{PACKAGE}.Normal.rsample",
    "log_prob": f"{PACKAGE}.Normal.log_prob",
    "entropy": f"{PACKAGE}.Normal.entropy",
    "undo": None,
}


def link(role: re.Match[str]) -> str:
    """A Markdown link to what a role names; of another library, its name alone."""
    name = role[1]
    if "." in name and not name.startswith(f"{PACKAGE}."):
        return f"`{name}`"
    short = name.removeprefix(f"{PACKAGE}.")
    home = HOMES.get(short, f"{PACKAGE}.{short}")
    return f"`{short}`" if home is None else f"[`{short}`][{home}]"


class Roles(griffe.Extension):
    """Rewrites the docstring of each object before it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
