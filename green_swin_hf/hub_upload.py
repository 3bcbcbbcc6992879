"""The Hub's side of publishing: asking before the work whether it will work, and one commit for all files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import logging

_TIMEOUT_SECONDS = 10
# Tokens, passwords of addresses, and what signs an address of a large file.
_CREDENTIALS = (r"\bhf_[A-Za-z0-9]{10,}", r"(?<=Bearer )\S+", r"(?<=://)[^/@\s]+(?=@)", r"(?<=\?)[^\s'\">]+=[^\s'\">]+")


def add_hub_flags(parser: argparse._ActionsContainer) -> None:
    """Flags of a script that can upload its results; `open_hub` reads them."""
    parser.add_argument("--push-to-hub", action="store_true", help="upload the results (to a private repository)")
    parser.add_argument("--hub-model-id", metavar="NAME", help="repository (default: name of the output folder)")
    parser.add_argument("--hub-public", action="store_true", help="make a new repository public")


def open_hub(arguments: argparse.Namespace, output: Path) -> str | None:
    """The repository to upload to, made and writable; None without --push-to-hub. One process asks for all.

    Raises:
        ValueError: as `prepare_upload`.
    """
    if not arguments.push_to_hub:
        return None
    answer: list[str | None] = [None, None]
    if PartialState().is_main_process:
        try:
            name = arguments.hub_model_id or output.resolve().name
            answer[0] = prepare_upload(name, private=not arguments.hub_public)
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def prepare_upload(repo_id: str, *, private: bool = True) -> str:
    """Make sure that a later upload can work: the Hub answers, the token is good, the repository is ours to write.

    The repository is made if it does not exist: only so can a missing permission be seen before the work is done.

    Args:
        repo_id: `name` or `user/name`.
        private: visibility of a repository that is made; True also refuses one that is public already.

    Returns:
        The full `user/name`.

    Raises:
        ValueError: one of these does not hold, in one line with the remedy.
    """
    if get_token() is None:
        raise ValueError("uploading needs a token; log in with `hf auth login` or set HF_TOKEN")
    endpoint = constants.ENDPOINT
    try:
        # `HfApi` waits for ever where a server takes the connection and is silent: knock first, with a time limit.
        get_session().head(endpoint, timeout=_TIMEOUT_SECONDS)
        api = HfApi()
        api.whoami()
        found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = api.model_info(found).private
    except HFValidationError as error:
        raise ValueError(f"the repository {repo_id!r} has no valid name: {one_line(error)}") from None
    except HfHubHTTPError as error:
        raise ValueError(
            f"the Hub at {redacted(endpoint)} refuses {repo_id!r}: {one_line(error)}; check HF_TOKEN and the "
            "repository's name"
        ) from None
    except Exception as error:  # the HTTP library's own types, which differ between versions of huggingface_hub
        raise ValueError(
            f"the Hub at {redacted(endpoint)} does not answer ({type(error).__name__}); check the connection and "
            "HF_ENDPOINT, or publish later with python -m green_swin_hf.publish"
        ) from None
    if private and not is_private:
        raise ValueError(f"{found} is a public repository already; ask for a public one, or give another name")
    return found


def upload_files(
    repo_id: str, files: Mapping[str, Path | bytes], message: str, own: re.Pattern[str] | None = None
) -> str:
    """Upload files, and nothing else, in one commit: a reader of the repository sees all of them or none.

    Args:
        repo_id: `user/name`.
        files: by their names in the repository.
        message: of the commit.
        own: matches names that belong to such a set of files; those in the repository that are not in this one, such as
            one file of weights where there are shards now, are removed by the same commit.

    Returns:
        Address of the commit.

    Raises:
        OSError: the upload failed; the repository is as it was. The message holds no credentials.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a warning of each new attempt would show the signed address
    try:
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        present = HfApi().list_repo_files(repo_id) if own else []
        old = [name for name in present if own and own.fullmatch(name) and name not in files]
        operations += [CommitOperationDelete(name) for name in old]
        commit: Any = HfApi().create_commit(repo_id, operations, commit_message=message)
    except Exception as error:  # the network's and the Hub's
        raise OSError(one_line(error)) from None
    finally:
        logging.set_verbosity(verbosity)
    return str(commit.commit_url)


def one_line(error: Exception) -> str:
    """What an error says, in one line of at most 300 characters without credentials."""
    return " ".join(redacted(str(error) or type(error).__name__).split())[:300]


def redacted(text: str) -> str:
    """The text with every token, password and signature of an address as `***`."""
    token = get_token()
    for pattern in (*([re.escape(token)] if token else []), *_CREDENTIALS):
        text = re.sub(pattern, "***", text)
    return text


__all__ = ["add_hub_flags", "one_line", "open_hub", "prepare_upload", "redacted", "upload_files"]
