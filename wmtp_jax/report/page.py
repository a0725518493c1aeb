"""One self-contained HTML file: markup, style, script and data in one, nothing fetched from anywhere.

Everything that a run holds is untrusted: validation code may spell `</script>`, a directory may be called `<b>`. It goes into
the page as JSON in which `<`, `>` and `&` are escapes, and the script sets it as text; the page's policy allows this very script
and this very style, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

from wmtp_jax.report.palette import GROUPS, LEVELS, shades

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def render(content: dict[str, Any], *, title: str) -> str:
    """The page of what `content.page_content` gives, with `made`, `command`, `left` and `mapLeftOut` added."""
    style = _file("page.css") + _colours()
    script = _file("page.js").replace("__LEVELS__", str(LEVELS))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    data = embed(content)
    parts = {"__POLICY__": policy, "__TITLE__": html.escape(title), "__CSS__": style, "__DATA__": data, "__JS__": script}
    page = _file("page.html")
    pieces = []
    for placeholder, text in parts.items():  # in the order of the template, so that no text is searched for placeholders
        before, page = page.split(placeholder, 1)
        pieces += [before, text]
    return "".join([*pieces, page])


def embed(value: Any) -> str:
    """JSON that can stand within a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate, of a file name that is not UTF-8, can't be written.
    text = text.encode("utf-8", "replace").decode("utf-8")
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _colours() -> str:
    def rules(scheme: str) -> str:
        levels = "".join(
            f".w{number}{{background:{background};color:{text}}}"
            for number, (background, text) in enumerate(shades(scheme))
        )
        groups = "".join(f"--g{number}:{colour};" for number, colour in enumerate(GROUPS[scheme]))
        return f":root{{{groups}}}{levels}"

    return f"{rules('light')}@media (prefers-color-scheme: dark){{{rules('dark')}}}"


def _file(name: str) -> str:
    return resources.files("wmtp_jax.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
