"""Sending the result of a run to the Hub, and asking before the run whether that will work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

_TIMEOUT_SECONDS = 10


def prepare_upload(repo_id: str, *, private: bool = True) -> str:
    """Make sure that a later upload can work: the Hub answers, the token is good, the repository is ours to write.

    The repository is made if it does not exist: only so can a missing permission be seen before the work is done.

    Args:
        repo_id: `name` or `user/name`.
        private: visibility of a repository that is made.

    Returns:
        The full `user/name`.

    Raises:
        ValueError: one of these does not hold, in one line with the remedy.
    """
    if get_token() is None:
        raise ValueError("--push-to-hub needs a token; log in with `hf auth login` or set HF_TOKEN")
    endpoint = constants.ENDPOINT
    try:
        # `HfApi` waits for ever where a server takes the connection and is silent: knock first, with a time limit.
        get_session().head(endpoint, timeout=_TIMEOUT_SECONDS)
        api = HfApi()
        api.whoami()
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except HFValidationError as error:
        raise ValueError(f"--hub-model-id {repo_id!r} is no valid name: {_short(error)}") from None
    except HfHubHTTPError as error:
        raise ValueError(
            f"the Hub at {endpoint} refuses {repo_id!r}: {_short(error)}; check HF_TOKEN and --hub-model-id"
        ) from None
    except Exception as error:  # the HTTP library's own types, which differ between versions of huggingface_hub
        raise ValueError(
            f"the Hub at {endpoint} does not answer ({type(error).__name__}); check the connection and HF_ENDPOINT, "
            "or train without --push-to-hub"
        ) from None


def upload_files(repo_id: str, folder: Path, names: Sequence[str], message: str = "Add model") -> str:
    """Upload the named files of a folder, and nothing else, in one commit.

    Returns:
        Address of the commit.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} not found in {folder}")
    commit: Any = HfApi().upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=list(names), commit_message=message
    )
    return str(commit.commit_url)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


__all__ = ["prepare_upload", "upload_files"]
