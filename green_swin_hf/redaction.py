"""What others may read of a text: no credentials, and in the place of a path of this machine its last component."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import get_token

# Tokens of the Hub, those of headers, what stands before the @ of an address (keys may hold a slash, ports are none),
# and what signs the address of a large file.
_CREDENTIALS = (
    r"\bhf_[A-Za-z0-9]{10,}",
    r"(?<=Bearer )\S+",
    r"(?<=://)(?:[^/\s]+|[^/:\s]+:(?!\d+/)\S+)(?=@)",
    r"(?<=\?)[^\s'\">]+=[^\s'\">]+",
)
# Absolute, below a home, relative from here or above; of Windows with a drive or a server; as an address.
_LOCAL_PATH = re.compile(r"(file:|/|~|\.\.?[\\/]|\\\\|[a-z]:[\\/])[^\n]*$", flags=re.IGNORECASE)
_NAMES_OF_CLASSES = ("id2label", "label2id", "class_names", "most_common_class")


def redacted(text: str) -> str:
    """The text with every token, password and signature of an address as `***`."""
    token = get_token()
    for pattern in (*([re.escape(token)] if token else []), *_CREDENTIALS):
        text = re.sub(pattern, "***", text)
    return text


def one_line(error: Exception) -> str:
    """What an error says, in one line of at most 300 characters without credentials."""
    return " ".join(redacted(str(error) or type(error).__name__).split())[:300]


def without_local_paths(value: Any) -> Any:
    """The same JSON content without credentials; of text that is a path of this machine, the last component.

    Names of classes stay as they are, whatever they look like.

    >>> without_local_paths(["file:///home/me/cats", "s3://key:secret@bucket/cats", "someone/cats"])
    ['cats', 's3://***@bucket/cats', 'someone/cats']
    """
    if isinstance(value, dict):
        return {key: entry if key in _NAMES_OF_CLASSES else without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = redacted(value)
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if _LOCAL_PATH.match(text) else text


__all__ = ["one_line", "redacted", "without_local_paths"]
