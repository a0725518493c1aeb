"""What the command-line entry files share: flags parsed with one-line errors, and errors turned into exit codes.

Exit codes: 0 done, 2 an error the user can put right (a wrong flag included), 3 a non-finite loss, 5 another process of the
run is gone, 130 and 143 stopped by SIGINT and SIGTERM. A bug ends in a traceback and 1.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from absl import flags
from ml_collections import ConfigDict, config_flags

from wmtp_jax.config import freeze
from wmtp_jax.errors import NonFiniteLoss, UserError
from wmtp_jax.settings import Configuration
from wmtp_jax.storage.s3 import is_remote, join, shown


class Stopped(Exception):
    """A run left cleanly because of a signal; carries its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """While open, SIGINT and SIGTERM set `received` instead of ending the process; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def define_config_flag() -> None:
    """`--config`, a recipe and its changes."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The recipe and its target: configs/NAME.py[:local|mps|gpu|vessl]. Any key can be changed with "
        "--config.SECTION.KEY=VALUE; wmtp_jax/settings.py lists every key with its meaning.",
        lock_config=True,
    )


def define_device_flag() -> None:
    """`--device`."""
    flags.DEFINE_string(
        "device",
        None,
        "Where to compute: cpu, cuda or tpu (the torch backend: cpu, cuda or mps). By default the best there is.",
    )


def define_run_flags() -> None:
    """The flags of both trainers: `--config` and how to run it."""
    define_config_flag()
    define_device_flag()
    flags.DEFINE_string("workdir", None, "The run directory. By default runs/RUN_NAME. s3://BUCKET/PREFIX/NAME: runs/NAME, "
        "with a copy there that is kept in the background and gone on with.")
    flags.DEFINE_string("run_name", None, "Name of the run in MLflow. By default the recipe's name and the algorithm.")
    flags.DEFINE_list("tags", [], "MLflow tags, KEY=VALUE[,KEY=VALUE...].")
    flags.DEFINE_string(
        "resume",
        "auto",
        "auto: go on where the run directory stopped, or start; never: start anew, replacing what is there; PATH: go on "
        "from a copy of another run's newest checkpoint, or of a checkpoint of it.",
    )
    flags.DEFINE_bool("dry_run", False, "Resolve everything, print the plan (data, shapes, memory) and train nothing.")
    flags.DEFINE_bool("verbose", False, "Print the whole configuration and the libraries' own log lines.")


def parse_tags(tags: list[str]) -> dict[str, str]:
    """`["a=b"] -> {"a": "b"}`."""
    parsed = {}
    for tag in tags:
        key, equals, value = tag.partition("=")
        if not key or not equals:
            raise UserError(f"--tags: {tag!r} is not KEY=VALUE")
        parsed[key] = value
    return parsed


def recipe_name(config_flag: str) -> str:
    """`configs/rho1_weighted.py:gpu -> rho1_weighted`."""
    return config_flag.rpartition("/")[2].split(".py")[0]


def run(main: Callable[..., None], *, description: str, required: tuple[str, ...] = (), arguments: str = "") -> None:
    """Parses `sys.argv` into absl's FLAGS, calls `main`, and ends the process with the exit code of what happened.

    Args:
      main: gets the arguments that are no flags, a list, where `arguments` says that there may be such.
      description: what --help says first.
      required: flags that must be given.
      arguments: what the arguments are called that are no flags; they may stand between flags. "": there are none.
    """
    try:
        flags.FLAGS.set_gnu_getopt(bool(arguments))
        if any(argument in ("--help", "-h", "-help") for argument in sys.argv[1:]):
            print(f"{description.strip()}\n\n{_flags_help()}")
            sys.exit(0)
        try:
            rest = flags.FLAGS(sys.argv)
        except flags.Error as error:
            raise UserError(_first_line(error)) from error
        except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
            # config_flags runs the recipe and sets its keys while it parses, and lets whatever happens there through.
            named = f"{_first_line(error)}: no such key" if isinstance(error, (AttributeError, KeyError)) else _first_line(error)
            raise UserError(f"--config: {named} (wmtp_jax/settings.py lists them, with their types)") from error
        if len(rest) > 1 and not arguments:
            raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        for name in required:
            if flags.FLAGS[name].value is None:
                raise UserError(f"--{name} is needed; see --help")
        main(rest[1:]) if arguments else main()
    except UserError as error:
        _fail(error, 2)
    except NonFiniteLoss as error:
        _fail(error, 3)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: Exception, code: int) -> None:
    # All of it in one line: what a library said may have several, and the remedy often comes last.
    print(f"error: {shown(' '.join(str(error).splitlines()))}", file=sys.stderr)
    sys.exit(code)


def _first_line(error: BaseException) -> str:
    """What absl or a recipe said, without its quotes and further lines."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # A KeyError that was passed on arrives as the repr of its message.
    text = text.replace("\\n", "\n").replace("\\'", "'")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0].strip("\"'") if lines[0][0] in "\"'" else lines[0]


@dataclass(frozen=True)
class RunOptions:
    """What the command line says of a run besides its configuration; see `define_run_flags`."""

    workdir: Path
    run_name: str
    tags: dict[str, str] = field(default_factory=dict)
    resume: str = "auto"
    dry_run: bool = False
    verbose: bool = False
    device: str | None = None


def run_options() -> tuple[Configuration, RunOptions]:
    """Configuration and options from the flags of `define_run_flags`."""
    values, config = flags.FLAGS, config_from_flags()
    workdir = values.workdir
    if workdir and is_remote(workdir):
        if config.checkpoint.remote not in ("", workdir):
            raise UserError(f"--workdir={workdir} and config.checkpoint.remote = {config.checkpoint.remote!r}: give one of them")
        config = replace(config, checkpoint=replace(config.checkpoint, remote=join(workdir)))
        workdir = "runs/" + join(workdir).rpartition("/")[2]
    run_name = values.run_name or f"{recipe_name(values['config'].config_filename)}-{config.weighting.algorithm}"  # pyrefly: ignore[missing-attribute]  # of its flag
    options = RunOptions(
        workdir=Path(workdir or f"runs/{run_name}"),
        run_name=run_name,
        tags=parse_tags(values.tags),
        resume=values.resume,
        dry_run=values.dry_run,
        verbose=values.verbose,
        device=values.device,
    )
    return config, options


def _flags_help() -> str:
    lines = ["Flags:"]
    for module, defined in sorted(flags.FLAGS.flags_by_module_dict().items()):
        if not module.startswith(("wmtp", "__main__")) and module != sys.argv[0]:
            continue
        for flag in sorted(defined, key=lambda flag: flag.name):
            shown = "" if flag.default in (None, [], "") else f" (default {flag.default})"
            lines.append(f"  --{flag.name}: {flag.help}{shown}")
    return "\n".join(lines)


def config_from_flags() -> Configuration:
    """The recipe with the command line's changes, checked.

    Raises:
      UserError: the recipe is not there, or a value is one that can't be.
    """
    return freeze(_tree_from_flags())


def _tree_from_flags() -> ConfigDict:
    config = flags.FLAGS.config
    try:
        config.lock()
    except OSError as error:  # ml_collections keeps the error until the configuration is used
        given = next(argument for argument in sys.argv if argument.lstrip("-").startswith("config"))
        raise UserError(f"{given}: no such recipe; they are in configs/") from error
    return config
