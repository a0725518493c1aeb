"""The first code inside the sandbox: `launcher` passes this file's text to `python -c`, with a role.

Descriptors: 3 holds the source, 4 the proof of completion (a socket with a token to read and write back), 5 the link
between a candidate and its tests. Roles: `program` and `tests` run the source as `__main__` and then give the proof;
`printer` runs it as `__main__` without, since its output decides; `candidate` runs the source as a module and answers the
tests' requests.

In the roles with a proof, code that must not be trusted runs in this interpreter before the proof is given. What keeps
the token from it is written at `_deny` and at the expression that gives the proof.
"""

import builtins
import sys
from _collections import deque  # pyrefly: ignore[missing-import]  # CPython has it
from _sitebuiltins import Quitter
from posix import read, set_inheritable, write

# What a value that crosses the link may be, beside None, bool, str, float and small integers, which JSON has.
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
MUTABLE = (list, dict, set, bytearray, deque)


def encode(value, keep):
    """Returns JSON for plain data (by value; a subclass becomes its base) and `["ref", keep(value)]` for the rest."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**53 else ["int", hex(value)]
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(item, keep)] for key, item in value.items()]]
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [encode(item, keep) for item in value]]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return ["class", value.__name__]
    if isinstance(value, type(sys)):
        return ["module", value.__name__]
    if type(value).__module__ in ("decimal", "fractions") and type(value).__name__ in ("Decimal", "Fraction"):
        return [type(value).__name__, str(value)]
    return ["ref", keep(value)]


def decode(data, resolve):
    """Returns the value that `encode` turned into `data`; `resolve(number)` stands for what was passed by reference.

    Whatever `data` is, the result holds plain data, built-in classes, modules of the standard library, and what
    `resolve` returns; nothing that the other side named is called.
    """
    if not isinstance(data, list):
        return data
    match data:
        case ["int", digits]:
            return int(digits, 16)
        case ["complex", real, imag]:
            return complex(real, imag)
        case ["bytes", digits]:
            return bytes.fromhex(digits)
        case ["bytearray", digits]:
            return bytearray.fromhex(digits)
        case ["dict", items]:
            return {decode(key, resolve): decode(item, resolve) for key, item in items}
        case ["range", start, stop, step]:
            return range(start, stop, step)
        case ["class", name] if isinstance(vars(builtins).get(name), type):
            return vars(builtins)[name]
        case ["module", name]:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                raise ImportError(f"tests may take modules of the standard library from a candidate, not {name}")
            __import__(name)
            return sys.modules[name]
        case ["Decimal", text]:
            from decimal import Decimal

            return Decimal(text)
        case ["Fraction", text]:
            from fractions import Fraction

            return Fraction(text)
        case ["ref", number]:
            return resolve(number)
        case [name, items]:
            return SEQUENCES[name](decode(item, resolve) for item in items)
    raise ValueError(f"not a value: {data!r}")


class Link:
    """The tests' end: asks the candidate's process to act on its objects."""

    def __init__(self, stream):
        self.stream = stream
        self.remotes = {}

    def resolve(self, number):
        if number not in self.remotes:
            self.remotes[number] = Remote(self, number)
        return self.remotes[number]

    def encode(self, value):
        def keep(item):
            if type(item) is Remote:
                return object.__getattribute__(item, "_number")
            raise TypeError(f"tests can't pass a {type(item).__name__} to the candidate, only plain data")

        return encode(value, keep)

    def ask(self, verb, *operands):
        """Returns the answer to one request; lists, dicts and the like among `operands` change as they did there."""
        sent = [self.encode(operand) for operand in operands]
        try:
            self.stream.write(json.dumps([verb, *sent]).encode() + b"\n")
            self.stream.flush()
            line = self.stream.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            raise EOFError("the candidate's process has ended")
        try:
            said, value, rest = json.loads(line.decode())
            if said == "ok":
                value = decode(value, self.resolve)
                if rest is not None:
                    self.change([*operands[1], *operands[2].values()], rest)
                return value
            if said != "error":
                raise ValueError(said)
            error = exception(value, rest)
        except ImportError:  # A module that tests may not take.
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            # A candidate may write anything to the link.
            raise EOFError("the candidate's process wrote what is no answer") from None
        raise error

    def change(self, arguments, changes):
        """Makes the arguments of a call what they became there; those that are equal stay as they are."""
        for old, new in zip(arguments, changes, strict=True):
            if isinstance(old, MUTABLE) and self.encode(old) != new:
                new = decode(new, self.resolve)
                old.clear()
                old.update(new) if isinstance(old, (dict, set)) else old.extend(new)


def exception(name, message):
    """Returns the built-in exception of a name, or a RuntimeError."""
    kind = vars(builtins).get(name)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        kind = RuntimeError
    try:
        return kind(message)
    except TypeError:  # Some take more than a message.
        return RuntimeError(f"{name}: {message}")


class Remote:
    """An object in the candidate's process that is no plain data: a function, a class, an instance, an iterator.

    It equals itself alone, since the candidate must not be the judge of a comparison.
    """

    def __init__(self, link, number):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **keywords):
        return self._link.ask("call", self, list(arguments), keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._link.ask("setattr", self, name, value)

    def __getitem__(self, key):
        return self._link.ask("getitem", self, key)

    def __setitem__(self, key, value):
        self._link.ask("setitem", self, key, value)

    def __len__(self):
        return self._link.ask("len", self)

    def __iter__(self):
        return self._link.ask("iter", self)

    def __next__(self):
        return self._link.ask("next", self)

    def __bool__(self):
        return self._link.ask("bool", self)

    def __str__(self):
        return self._link.ask("str", self)

    def __repr__(self):
        return self._link.ask("repr", self)


def serve(stream, module):
    """Answers the tests' requests about the candidate `module` until they end."""
    objects, numbers = [], {}

    def keep(value):
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    verbs = {"getattr": getattr, "setattr": setattr, "len": len, "iter": iter, "next": next, "bool": bool, "str": str}
    verbs |= {
        "repr": repr,
        "getitem": lambda o, key: o[key],
        "setitem": lambda o, key, value: o.__setitem__(key, value),
    }
    for line in stream:
        verb, *operands = json.loads(line)
        try:
            operands = [decode(operand, objects.__getitem__) for operand in operands]
            changes = None
            if verb == "global":
                value = vars(module)[operands[0]]
            elif verb == "call":
                function, arguments, keywords = operands
                value = function(*arguments, **keywords)
                changes = [
                    encode(a, keep) if isinstance(a, MUTABLE) else None for a in (*arguments, *keywords.values())
                ]
            else:
                value = verbs[verb](*operands)
            answer = json.dumps(["ok", encode(value, keep), changes])
        except BaseException as error:  # Whatever the candidate raises is the tests' to judge.
            name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            answer = json.dumps(["error", name, str(error)])
        stream.write(answer.encode() + b"\n")
        stream.flush()


def _deny(event, args):
    """An audit hook, which nothing can remove: refuses what reaches interpreter memory, the token among it.

    `gc` shows the values that a running expression holds, tracing can jump over lines, a new interpreter would have no
    hook, `ctypes` and the modules of CPython's own tests touch any address, and so do `ioctl` and `fcntl` when handed
    an integer for a pointer. The code below must not depend on a global name, since the program can change those.
    """
    if event in {
        "gc.get_objects",
        "gc.get_referents",
        "gc.get_referrers",
        "sys.settrace",
        "sys.setprofile",
        "sys.monitoring.register_callback",
        "cpython.PyInterpreterState_New",
        "fcntl.fcntl",
        "fcntl.ioctl",
        "sqlite3.enable_load_extension",
        "sqlite3.load_extension",
    } or event.startswith("ctypes."):
        raise RuntimeError("the sandbox has no " + event)
    # Joining makes a true str of a subclass that lies about its value.
    if event == "import" and "".join((args[0],)).rpartition(".")[2] in {
        "_ctypes",
        "_ctypes_test",
        "_interpreters",
        "_testbuffer",
        "_testcapi",
        "_testinternalcapi",
        "_testlimitedcapi",
        "_testmultiphase",
        "_testsinglephase",
        "_xxsubinterpreters",
        "_xxtestfuzz",
        "xxlimited",
        "xxlimited_35",
    }:
        raise ImportError("the sandbox has no module " + args[0])


if __name__ == "__main__":
    role, names = sys.argv[1], sys.argv[2:]
    sys.argv[:] = [""]
    # What `site` would have added; it is skipped for its time.
    builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D (i.e. EOF)"), Quitter("quit", "Ctrl-D (i.e. EOF)")
    with open(3, "rb") as stream:
        source = stream.read().decode("utf-8", "surrogatepass")
    runner = sys.modules["__main__"]  # Kept alive: its frame goes on after the program has taken its name.
    module = type(sys)("candidate" if role == "candidate" else "__main__")
    module.__builtins__ = builtins
    sys.modules[module.__name__] = module
    if role in ("candidate", "tests"):
        import io
        import json  # Here, since it would be a third of the time that a short program takes.

        link = open(5, "r+b", buffering=0)
        stream = io.BufferedRWPair(link, link)
    if role == "tests":
        link = Link(stream)
        for name in names:
            try:
                setattr(module, name, link.ask("global", name))
            except KeyError:  # The candidate has no such name; tests that use it fail with a NameError.
                pass
    proves = role in ("program", "tests")
    if proves:
        set_inheritable(4, False)
        sys.addaudithook(_deny)
    del _deny
    try:
        if not proves:
            name = "<candidate>" if role == "candidate" else "<program>"
            exec(compile(source, name, "exec", dont_inherit=True), vars(module))
        else:
            # The proof. While `exec` runs, `write`, 4 and the token lie on this frame's value stack and nowhere else:
            # no name, constant, container or object that the garbage collector lists leads to them. And once it
            # returns, nothing but C code that nobody can replace stands between the program's end and the proof.
            write(
                4,
                read(4, 32) + (exec(compile(source, f"<{role}>", "exec", dont_inherit=True), vars(module)) or b""),
            )
    except SystemExit:
        raise
    except BaseException as error:
        # As Python itself would, but without the frame of this file in the traceback.
        error = error.with_traceback(error.__traceback__.tb_next)  # pyrefly: ignore[missing-attribute]  # it was raised
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1) from None
    if role == "candidate":
        serve(stream, module)
