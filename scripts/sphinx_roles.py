"""Sphinx's roles and formulas in docstrings, as the site shows them; an extension of griffe, which reads docstrings.

Formulas become MathML, which browsers draw themselves: nothing is fetched for them.
"""

from __future__ import annotations

import re
from html import escape
from textwrap import dedent, indent
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r"^( *)\.\. math::(.*(?:\n|\Z)(?:\n|\1 +.*(?:\n|\Z))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:class|func|meth|attr|mod):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^( *)Example::$", re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring.

        Args:
            obj: A module, class, function or attribute.
            **kwargs: Griffe's.
        """
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """A docstring with Markdown and MathML in the place of Sphinx's markup.

    Args:
        docstring: As it stands in the source.

    Returns:
        It, with the same indentation.
    """
    text = FORMULA.sub(lambda found: indent(_formula(dedent(found[2]), "block"), found[1]) + "\n\n", docstring)
    text = INLINE.sub(lambda found: _formula(found[1], "inline"), text)
    text = ROLE.sub(lambda found: _reference(found[2], short=bool(found[1])), text)
    return EXAMPLE.sub(lambda found: f"{found[1]}Example:", text)


def _formula(latex: str, display: str) -> str:
    """MathML on one line; the converter does not know arg as a function."""
    words = " ".join(latex.split()).replace(r"\arg\min", r"\operatorname{arg\,min}")
    mathml = convert(words, display=display)
    return f'<div class="formula">{mathml}</div>' if display == "block" else mathml


def _reference(name: str, *, short: bool) -> str:
    """A link to where the site describes the name, or the name alone if it does not."""
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{escape(name)}"><code>{escape(shown)}</code></autoref>'
