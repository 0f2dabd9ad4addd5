"""What building the documentation takes besides mkdocs.yml: equations, and sections of docstrings.

A block ```` ```math ```` holds LaTeX, as on GitHub. It becomes SVG: no script, font or network to read it.
"""

import re
from html import escape
from typing import Any

import griffe
from ziamath import Latex


def equation(source: str, *_: Any, **__: Any) -> str:
    """The HTML of one block, for pymdownx.superfences: glyphs as paths, in the colour of the text."""
    drawn = re.sub(r"(\.\d\d)\d+", r"\1", Latex(source, size=19, color="currentColor").svg())
    return f'<div class="equation" role="img" aria-label="{escape(source)}">{drawn}</div>'


def on_config(config: Any) -> Any:
    """Register the block; MkDocs calls it with its settings."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": equation})
    return config


class Sections(griffe.Extension):
    """A docstring's section "Example" is what griffe knows as "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
