"""The errors that end a run on purpose; `main.py` turns each into one line on stderr and an exit code."""


class UserError(Exception):
    """What the user can put right: names the key, file or line, and what to do. Exit code 2, without a traceback."""


class NonFiniteLoss(Exception):
    """The loss or a gradient became NaN or infinite; what explains it was saved. Exit code 3."""
