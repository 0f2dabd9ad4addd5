"""Equations of the documentation as SVG, drawn when it is built: no script, no font and no network where it is read.

A block ```` ```math ```` holds LaTeX, as on GitHub.
"""

import re
from html import escape
from typing import Any

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
