"""Verdicts on programs that print: what counts as the same output, and what such programs may do to get there."""

import textwrap

import pytest

from wmtp_jax.data.problems import Problem
from wmtp_jax.sandbox.judging import failure, same_output

# Output, expected output, and what the rule of CodeContests' own matcher says of them, worked by hand.
PAIRS = [
    ("3", "3\n", True),
    ("", "\n", True),
    ("", "0", False),
    ("1 2", "1\n2\r\n", True),
    ("1\t2\v3", "1 2 3", True),
    ("1 2", "12", False),
    ("1 2", "1 2 3", False),
    ("2 1", "1 2", False),
    ("YES\nno", "yes No", True),
    ("yes", "yes.", False),
    # Only the case of ASCII letters.
    ("É", "é", False),
    ("\N{KELVIN SIGN}", "k", False),
    # Only those characters separate.
    ("1\N{NO-BREAK SPACE}2", "1 2", False),
    ("1\f2", "1 2", False),
    ("1\f", "1", True),
    # Numbers, by their absolute difference.
    ("0.3333333333333333", "0.333333333333", True),
    ("2", "2.0", True),
    ("2.5", "2.5000", True),
    ("1e-05", "0.00001000", True),
    ("+1", "1", True),
    ("007", "7", True),
    ("-0", "0", True),
    (".5", "0.5", True),
    ("5.", "5", True),
    ("1E3", "1000", True),
    ("0.000009", "0", True),
    ("0.00001", "0", False),
    ("0.999991", "1", True),
    ("0.99998", "1", False),
    ("100000.1", "100000.2", False),
    ("1000000.00002", "1000000", False),
    ("1000000.000009", "1000000", True),
    ("1", "2", False),
    ("-1", "1", False),
    ("1e400", "1e400 ", True),
    ("inf 1", "inf 1.0", False),
    ("nan", "nan", True),
    ("nan 1", "nan 1.0", False),
    # Float64 can't tell these apart.
    ("9007199254740993", "9007199254740992", True),
    ("1000000000000000001", "1000000000000000000", True),
    ("9007199254740991", "9007199254740990", False),
    # What Python takes for a number and the matcher does not.
    ("1_0", "10", False),
    ("\N{ARABIC-INDIC DIGIT ONE}", "1", False),
    ("0x10", "16", False),
    ("+-1", "-1", False),
    ("1e", "1", False),
    ("1/3", "0.333333", False),
]


@pytest.mark.parametrize(("output", "expected", "same"), PAIRS)
def test_the_same_output(output, expected, same):
    assert same_output(output, expected) is same
    assert same_output(expected, output) is same


def test_one_wrong_number_among_many():
    numbers = [f"{i / 7}" for i in range(1000)]
    rounded = [f"{i / 7:.6f}" for i in range(1000)]
    assert same_output(" ".join(numbers), "\n".join(rounded))
    rounded[500] = "71.4286"  # 71.428571...
    assert not same_output(" ".join(numbers), "\n".join(rounded))


OPENINGS = {
    "a third": "print(1 / 3)",
    "an unlimited stack": """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.setrecursionlimit(10**6)
        def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
        print(1 / 3 if depth(100000) == 100000 else 0)
    """,
    "a large stack": """
        import resource
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 29, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_STACK, (0x10000000, -1))
        print(1 / 3)
    """,
    "a thread with a large stack": """
        import sys, threading
        sys.setrecursionlimit(10**7)
        threading.stack_size(1 << 29)
        def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
        def main(): print(1 / 3 if depth(100000) == 100000 else 0)
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
    """,
    "ctypes": """
        import ctypes
        from ctypes import CDLL, CFUNCTYPE, c_double
        third = CFUNCTYPE(c_double, c_double)(lambda x: x / 3)
        CDLL(None).printf(b"%.9f", c_double(third(1.0)))
        CDLL(None).fflush(None)
    """,
    "tracing, gc and fcntl": """
        import fcntl, gc, sys
        sys.settrace(None)
        gc.get_objects(), gc.get_referents([])
        fcntl.fcntl(1, fcntl.F_GETFL)
        print(1 / 3)
    """,
    "an exit before the end": "import os, sys\nprint(1 / 3)\nsys.stdout.flush()\nos._exit(0)\n",
}


@pytest.mark.parametrize("name", OPENINGS)
def test_published_solutions_that_print(name):
    problem = Problem("third", "", (), inputs=("",), outputs=("0.333333333333\n",))
    assert failure(problem, textwrap.dedent(OPENINGS[name]), timeout_seconds=20) == ""


def test_wrong_programs_that_print():
    problem = Problem("third", "", (), inputs=("",), outputs=("0.333333333333\n",))
    for source, reason in (
        ("print(0.3334)", "input 1: wrong output"),
        ("print(1 / 3)\nexit(3)", "input 1: failed: exit code 3"),
        ("print(1 / 3)\nraise ValueError", "input 1: failed: exit code 1: ValueError"),
        ("print(1 / 3, flush=True)\nwhile True: pass", "input 1: timeout"),
        ("print(1 / 3)\nprint('x' * (1 << 25))", "input 1: failed: above its limit of output"),
    ):
        assert failure(problem, source, timeout_seconds=2).startswith(reason)
