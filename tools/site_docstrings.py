"""A griffe extension of mkdocs.yml: docstrings as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Names that griffe expects, and Markdown instead of Sphinx roles and double backticks."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        # Arguments that share a description may take two lines; griffe expects their colon on the first.
        text = re.sub(r"^( {4}(?:\w+, )+\w+,)\n +", r"\1 ", text, flags=re.MULTILINE)
        text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text)
        obj.docstring.value = text.replace("``", "`")
