"""Files from the Hugging Face hub, and how asking for them fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wmtp_jax.errors import UserError


def snapshot(name: str, patterns: Sequence[str], *, told: str, revision: str | None = None) -> Path:
    """The directory of a repository's files, fetched where the hub's cache does not have them.

    Args:
      name: of the repository, `owner/name`.
      patterns: of the files' names.
      told: what the error begins with: the key, or the path as it was given.
      revision: branch, tag or commit; None: the main branch.

    Raises:
      UserError: the hub can't be reached, refuses, or answers with something else.
    """
    # Imported late: most weights and tokenizers are local.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{told}: no such directory here, not in the hub's cache, and the hub can't be reached; give a local directory"
        ) from error
    except (errors.HTTPError, OSError, ValueError, LookupError, TypeError) as error:
        # Refused, a connection that breaks, or an answer that is none, as of a network's sign-in page.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{told}: no such directory here, and the hub did not give it: {reason}") from error
