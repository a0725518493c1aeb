"""Coding problems with their solutions and tests: MBPP, HumanEval and CodeContests as published, in one form."""

from __future__ import annotations

import builtins
import itertools
import symtable
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from wmtp_jax.data.documents import Document, completion_document, json_type, string_field
from wmtp_jax.errors import UserError

_PYTHON3 = 3  # of CodeContests' languages


@dataclass(frozen=True)
class Problem:
    """A task for a program, with programs that do it and programs that don't.

    Attributes:
      name: of the set and within it, "mbpp/601".
      prompt: what a solution is written after.
      solutions, incorrect_solutions: completions of the prompt.
      before, after: code that makes a program of a completion, which stands between them.
      tests: source that raises unless a program's definitions are right; "" where programs read stdin.
      names: what the tests take from the program.
      inputs, outputs: what a program reads from stdin and should then print, as `judging.same_output` compares it.
      public: how many of `inputs`, from the first on, are shown with the task.
    """

    name: str
    prompt: str
    solutions: tuple[str, ...]
    incorrect_solutions: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    tests: str = ""
    names: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    public: int = 0


def documents(problem: Problem, *, side: str = "") -> Iterator[Document]:
    """The problem's solutions after its prompt, right and wrong in turn, labelled so.

    Args:
      side: "train" or "validation"; "" leaves it to a hash of the problem's name.
    """
    right = [(solution, True) for solution in problem.solutions]
    wrong = [(solution, False) for solution in problem.incorrect_solutions]
    for solution, label in itertools.chain.from_iterable(itertools.zip_longest(right, wrong, fillvalue=("", None))):
        if label is not None:
            yield completion_document(problem.name, problem.prompt, solution, label=label, side=side)


# ---- the three sets --------------------------------------------------------------------------------------------------


def mbpp(entry: dict, where: str) -> Problem:
    """A problem of MBPP (Austin et al., 2021, arXiv 2108.07732).

    The prompt is a docstring of the task and its asserts, as Fried et al. (2022, arXiv 2204.05999) have it, with all asserts
    in place of one: they say what the function is called. Line ends become "\\n", in incorrect solutions too.

    Args:
      entry: `task_id text code test_list test_setup_code`, and `incorrect_solutions` where `wmtp_jax.data.mutate` made them.
      where: "FILE:LINE", for messages.

    Raises:
      UserError: fields that are missing or something else.
    """
    task_id = entry.get("task_id")
    if not isinstance(task_id, int) or isinstance(task_id, bool):
        raise UserError(f"{where}: the field `task_id` is {json_type(task_id)}, not a number: is this MBPP?")
    asserts = [line.strip() for line in strings_field(entry, "test_list", where)]
    if not asserts:
        raise UserError(f"{where}: the field `test_list` is empty: nothing says whether a solution is right")
    solution = _clean(string_field(entry, "code", where))
    after = _newlines(string_field(entry, "test_setup_code", where))
    wrong = strings_field(entry, "incorrect_solutions", where) if "incorrect_solutions" in entry else ()
    tests = _newlines("\n".join(asserts)) + "\n"
    return Problem(
        name=f"mbpp/{task_id}",
        prompt=_docstring(_newlines(string_field(entry, "text", where)).strip() + "\n" + tests),
        solutions=(solution,),
        incorrect_solutions=tuple(map(_clean, wrong)),
        after=after,
        tests=tests,
        names=_names(tests, solution + "\n" + after),
    )


def humaneval(entry: dict, where: str) -> Problem:
    """A problem of HumanEval (Chen et al., 2021, arXiv 2107.03374), with its own prompt.

    Args:
      entry: `task_id prompt canonical_solution test entry_point`.
      where: "FILE:LINE", for messages.

    Raises:
      UserError: fields that are missing or something else.
    """
    prompt, solution = string_field(entry, "prompt", where), string_field(entry, "canonical_solution", where)
    tests = f"{string_field(entry, 'test', where)}\ncheck({string_field(entry, 'entry_point', where)})\n"
    return Problem(
        name=string_field(entry, "task_id", where),
        prompt=prompt,
        solutions=(solution.rstrip() + "\n",),
        before=prompt,
        tests=tests,
        names=_names(tests, prompt + solution),
    )


def code_contests(entry: dict, where: str) -> Problem:
    """A problem of CodeContests (Li et al., 2022, arXiv 2203.07814), with its solutions in Python 3.

    The prompt is a docstring of the description.

    Args:
      entry: `name description solutions incorrect_solutions public_tests private_tests generated_tests`, each of the last
        five a structure of lists: `language` and `solution`, `input` and `output`.
      where: "FILE:ROW", for messages.

    Raises:
      UserError: fields that are missing or something else.
    """
    tests = [
        (_lists_field(entry, field, "input", where), _lists_field(entry, field, "output", where))
        for field in ("public_tests", "private_tests", "generated_tests")
    ]
    return Problem(
        name=f"code_contests/{string_field(entry, 'name', where)}",
        prompt=_docstring(_newlines(string_field(entry, "description", where)).strip() + "\n"),
        solutions=_in_python(entry, "solutions", where),
        incorrect_solutions=_in_python(entry, "incorrect_solutions", where),
        inputs=tuple(text for inputs, _ in tests for text in inputs),
        outputs=tuple(text for _, outputs in tests for text in outputs),
        public=len(tests[0][0]),
    )


READERS: dict[str, Callable[[dict, str], Problem]] = {
    "mbpp": mbpp,
    "humaneval": humaneval,
    "code_contests": code_contests,
}


def strings_field(entry: dict, name: str, where: str) -> list[str]:
    """A field that has to be a list of strings.

    Raises:
      UserError: it is missing or something else.
    """
    if name not in entry:
        raise UserError(f"{where}: the object has no field `{name}` (it has {', '.join(map(repr, entry))})")
    value = entry[name]
    if not isinstance(value, list):
        raise UserError(f"{where}: the field `{name}` is {json_type(value)}, not a list of strings")
    return [string_field({f"{name}[{n}]": item}, f"{name}[{n}]", where) for n, item in enumerate(value)]


def _lists_field(entry: dict, name: str, member: str, where: str) -> list[str]:
    value = entry[name] if name in entry else None
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: the field `{name}` is {json_type(value)}, not an object of lists: is this CodeContests?"
        )
    return strings_field(value, member, f"{where}: {name}")


def _in_python(entry: dict, name: str, where: str) -> tuple[str, ...]:
    solutions = _lists_field(entry, name, "solution", where)
    languages = entry[name]["language"] if "language" in entry[name] else None
    if not isinstance(languages, list) or len(languages) != len(solutions):
        raise UserError(f"{where}: `{name}` needs as many entries in `language` as in `solution`")
    chosen = zip(languages, solutions, strict=True)
    return tuple(dict.fromkeys(_clean(solution) for language, solution in chosen if language == _PYTHON3))


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _clean(code: str) -> str:
    return _newlines(code).strip("\n").rstrip() + "\n"


def _docstring(text: str) -> str:
    quotes = "'''" if '"""' in text else '"""'
    return f"{quotes}\n{text}{quotes}\n"


def _names(tests: str, program: str) -> tuple[str, ...]:
    """The global names that `tests` uses and does not bind; of the builtins only those that the program defines anew."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            defined = {s.get_name() for s in symtable.symtable(program, "p", "exec").get_symbols() if _binds(s)}
            tables = [symtable.symtable(tests, "t", "exec")]
    except (SyntaxError, ValueError):  # which running them will report
        return ()
    used, bound = set(), set(dir(builtins)) - defined
    for table in tables:  # which grows by the scopes inside
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                (bound if _binds(symbol) else used).add(symbol.get_name())
    return tuple(sorted(used - bound))


def _binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported()
