"""Text to tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import PTXError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+)
    | (?P<line>\n)
    | (?P<comment>//[^\n]*|/\*.*?\*/)
    | (?P<string>"[^"\n]*")
    | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?\b|0[bB][01]+U?\b
        |\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?\b)
    | (?P<word>[.%$_A-Za-z][\w$%]*(?:(?:\.|::)[\w$]+)*)
    | (?P<mark>[-+@!{}\[\]();:,=<>|])""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    kind: str
    text: str
    line: int
    start: int


def tokens(text: str) -> list[Token]:
    """The tokens of a module, with an empty one at its end."""
    found = []
    line, position = 1, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PTXError(f"line {line}: cannot read {text[position : position + 20]!r}")
        kind = match.lastgroup or ""
        if kind not in ("space", "line", "comment"):
            found.append(Token(kind, match[0], line, position))
        else:
            line += match[0].count("\n")
        position = match.end()
    found.append(Token("end", "", line, position))
    return found
