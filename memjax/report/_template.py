"""Our HTML templates, filled: everything that comes from outside is escaped text."""

import base64
import hashlib
import importlib.resources
from typing import Any

from memjax._core.errors import require


def fill(name: str, **values: Any) -> bytes:
    """A page as UTF-8.

    Args:
        name: of the template's file in this folder.
        **values: what it shows; text is escaped.

    Returns:
        HTML without scripts or references to anything outside it; the style sheet is named by its
        hash.
    """
    jinja2 = require("jinja2", "audit")
    package = importlib.resources.files("memjax.report")
    style = package.joinpath("page.css").read_text(encoding="utf-8").strip()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(package.joinpath(name).read_text(encoding="utf-8"))
    page = template.render(
        # The only markup that is not escaped is our own style sheet.
        style=require("markupsafe", "audit").Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        **values,
    )
    return page.encode("utf-8")
