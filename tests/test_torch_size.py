"""The torch backend is a thin mirror: what it need not say itself, it imports."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import wmtp_torch

LIMIT = 1000
_NOTHING = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def lines_of_code(source: str) -> int:
    """Lines that hold anything but comments and docstrings."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOTHING:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_lines_of_code_are_those_that_run():
    source = '"""Module.\n\nMore."""\nX = (  # why\n    1,\n)\n\n\ndef f():\n    """What."""\n    return X  # why\n'
    assert lines_of_code(source) == 5


def test_the_torch_backend_is_under_a_thousand_lines():
    files = sorted(Path(wmtp_torch.__file__).parent.rglob("*.py"))
    assert {"losses.py", "model.py", "train.py", "weighting.py"} <= {file.name for file in files}
    assert sum(lines_of_code(file.read_text()) for file in files) < LIMIT
