"""How docstrings are read for the reference."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

RETURNS = re.compile(r"^( *)Returns:\n((?:\1 +\S.*\n?|\n(?=\1 +\S))+)", re.MULTILINE)


def as_prose(returns: re.Match[str]) -> str:
    """What is returned as a paragraph: a colon in it would pass for the end of a type."""
    text = "**Returns:** " + textwrap.dedent(returns[2]).strip()
    return textwrap.indent(text, returns[1]) + "\n"


class Prose(griffe.Extension):
    """Docstrings in the form that the reference shows best.

    Griffe knows the heading "Examples:", and takes what stands below "Example:" for prose.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = RETURNS.sub(as_prose, text)
