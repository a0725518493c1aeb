"""Small mistakes made in Python source: single edits of its text at places that its syntax tree names.

Nothing else of the text changes, so that neither layout nor naming tells a mutant from its original. The kinds of edit are the
usual ones of mutation testing (Jia and Harman, 2011, "An analysis and survey of the development of mutation testing").
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

_COMPARISONS = {
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",), "!=": ("==",),
    "in": ("not in",), "not in": ("in",), "is": ("is not",), "is not": ("is",),
}  # fmt: skip
_ARITHMETIC = {
    "+": ("-",), "-": ("+",), "*": ("+", "//"), "/": ("//", "*"), "//": ("%", "*"), "%": ("//",), "**": ("*",),
    "<<": (">>",), ">>": ("<<",), "&": ("|",), "|": ("&",), "^": ("|",),
}  # fmt: skip
_SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/",
    ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&",
    ast.BitOr: "|", ast.BitXor: "^", ast.And: "and", ast.Or: "or",
}  # fmt: skip
_OPPOSITES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "upper": "lower", "lower": "upper", "isupper": "islower",
    "islower": "isupper", "append": "remove", "floor": "ceil", "ceil": "floor", "sum": "len", "startswith": "endswith",
    "endswith": "startswith", "lstrip": "rstrip", "rstrip": "lstrip", "True": "False", "False": "True",
}  # fmt: skip
_COMMUTATIVE = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr, ast.BitXor)
_PRIMARY = (ast.Name, ast.Call, ast.Attribute, ast.Subscript)  # what binds more tightly than any operator
_SIMPLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Break, ast.Continue, ast.Raise, ast.Delete)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

# The kind, where in the encoded text, and what goes there.
Edit = tuple[str, int, int, bytes]


def mutants(source: str, *, seed: str) -> Iterator[str]:
    """Different programs, each one edit away from `source` and not the same to Python; as many as there are.

    Kinds of edit take turns, each kind's places in random order, so that no kind prevails because it has many places.

    Args:
      source: a Python program with line ends "\\n"; one that doesn't parse has none.
      seed: of the order; the same source and seed give the same mutants.
    """
    tree = _parse(source)
    if tree is None:
        return
    text = source.encode()
    kinds: dict[str, list[Edit]] = {}
    for edit in edits(tree, text):
        kinds.setdefault(edit[0], []).append(edit)
    generator = random.Random(seed)
    for found in kinds.values():
        generator.shuffle(found)
    seen = {ast.dump(tree)}
    while kinds:
        order = list(kinds)
        generator.shuffle(order)
        for kind in order:
            _, start, end, new = kinds[kind].pop()
            if not kinds[kind]:
                del kinds[kind]
            mutant = (text[:start] + new + text[end:]).decode()
            changed = _parse(mutant)
            if changed is not None and (dump := ast.dump(changed)) not in seen:
                seen.add(dump)
                yield mutant


def edits(tree: ast.Module, text: bytes) -> Iterator[Edit]:
    """Every edit that there is to make, in the order of the tree; some may not parse.

    Args:
      tree: of the text.
      text: in UTF-8, as positions in the tree count.
    """
    place = _Places(text)
    inside_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in inside_strings:  # their positions are right from Python 3.12 on only
            continue
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
                    yield from _between(place, left, right, operator, _COMPARISONS, "comparison")
            case ast.BinOp():
                yield from _between(place, node.left, node.right, node.op, _ARITHMETIC, "arithmetic")
                if not isinstance(node.op, _COMMUTATIVE):
                    yield from _swapped(place, node.left, node.right, "operands")
            case ast.AugAssign():
                yield from _between(place, node.target, node.value, node.op, _ARITHMETIC, "arithmetic", assigns=True)
            case ast.BoolOp():
                other = {"and": ("or",), "or": ("and",)}
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from _between(place, left, right, node.op, other, "boolean")
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield "negation", place.start(node), place.start(node.operand), b""
            case ast.Constant(value=bool()):
                yield "constant", *place(node), _OPPOSITES[str(node.value)].encode()
            case ast.Constant(value=int()) if place.text_of(node).isdigit():
                for near in (node.value + 1, node.value - 1):
                    if near >= 0:
                        yield "constant", *place(node), str(near).encode()
            case ast.Name(id=name) if name in _OPPOSITES:
                yield "opposite", *place(node), _OPPOSITES[name].encode()
            case ast.Attribute(attr=name) if name in _OPPOSITES:
                end = place.end(node)
                yield "opposite", end - len(name), end, _OPPOSITES[name].encode()
            case ast.Call():
                for left, right in zip(node.args, node.args[1:], strict=False):
                    yield from _swapped(place, left, right, "arguments")
                if isinstance(node.func, ast.Name) and node.func.id == "range":
                    for argument in node.args:
                        if isinstance(argument, _PRIMARY):
                            for sign in (b"+", b"-"):
                                yield "range", place.end(argument), place.end(argument), place.spaced(sign) + b"1"
                forgotten = node.func.value if isinstance(node.func, ast.Attribute) else None
                if len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
                    forgotten = node.args[0]
                if isinstance(forgotten, _PRIMARY):
                    yield "call", *place(node), place.text_of(forgotten)
            case ast.If() | ast.While() | ast.IfExp():
                if isinstance(node.test, _PRIMARY):
                    yield "negation", place.start(node.test), place.start(node.test), b"not "
        if isinstance(node, _SCOPES):
            yield from _other_variables(place, node)
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list) and len(statements) > 1:
                for statement in statements:
                    if isinstance(statement, _SIMPLE) and not _is_docstring(statement):
                        yield from place.without(statement)


class _Places:
    """Positions of syntax nodes as offsets into the encoded text."""

    def __init__(self, text: bytes):
        self.text = text
        self._lines = [0, *(match.end() for match in re.finditer(b"\n", text))]

    def start(self, node: Any) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def end(self, node: Any) -> int:
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def __call__(self, node: ast.AST) -> tuple[int, int]:
        return self.start(node), self.end(node)

    def text_of(self, node: ast.AST) -> bytes:
        return self.text[self.start(node) : self.end(node)]

    def spaced(self, operator: bytes) -> bytes:
        """An operator with spaces around it where the text writes sums so."""
        return b" " + operator + b" " if re.search(rb"\w [+-] \w", self.text) else operator

    def without(self, statement: ast.stmt) -> Iterator[Edit]:
        """Removes a statement that has its lines to itself."""
        first = self._lines[statement.lineno - 1]
        last = self.text.find(b"\n", self.end(statement))
        last = len(self.text) if last < 0 else last + 1
        rest = self.text[first : self.start(statement)] + self.text[self.end(statement) : last]
        if not rest.strip():
            yield "removal", first, last, b""


def _between(
    place: _Places, left: ast.expr, right: ast.expr, operator: ast.AST, others: dict[str, tuple[str, ...]], kind: str,
    *, assigns: bool = False,
) -> Iterator[Edit]:  # fmt: skip
    """Another operator between two operands; parentheses may stand beside it, comments may not."""
    symbol = _SYMBOLS.get(type(operator))
    if symbol not in others:
        return
    begin, end = place.end(left), place.start(right)
    written = re.escape(symbol).replace(r"\ ", r"\s+") + ("=" if assigns else "")
    found = re.fullmatch(rf"[\s)\\]*({written})[\s(\\]*".encode(), place.text[begin:end])
    if found:
        for other in others[symbol]:
            yield kind, begin + found.start(1), begin + found.end(1), other.encode() + (b"=" if assigns else b"")


def _swapped(place: _Places, left: ast.expr, right: ast.expr, kind: str) -> Iterator[Edit]:
    if not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred):
        between = place.text[place.end(left) : place.start(right)]
        yield kind, place.start(left), place.end(right), place.text_of(right) + between + place.text_of(left)


def _other_variables(place: _Places, function: ast.AST) -> Iterator[Edit]:
    """A function's variable read where another one of it was meant."""
    nodes = [node for node in ast.walk(function) if isinstance(node, (ast.Name, ast.arg))]
    strings = {id(part) for node in ast.walk(function) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    local = {node.arg if isinstance(node, ast.arg) else node.id for node in nodes if not _is_read(node)}
    for node in nodes:
        if isinstance(node, ast.Name) and _is_read(node) and node.id in local and id(node) not in strings:
            for other in sorted(local - {node.id}):
                yield "variable", *place(node), other.encode()


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            compile(tree, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return None
    return tree
