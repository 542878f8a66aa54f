"""Reading files that others wrote: what a file is, and how large, is known before a byte of it is believed.

Whatever is wrong becomes an InputError: one sentence that names the file. Text taken from a file is shown by `shown`,
which keeps a sentence on one line and of readable length whatever the text holds.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from spec.config import InputError

MAX_JSON = 64 * 2**20  # bytes; the largest released config.json and index are below 20 MB


def size_of(path: Path) -> int:
    """Bytes in an ordinary file; a directory, a pipe (which would block), a dangling link are refused."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise InputError(f"{path} {what}") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{path} is a {'directory' if stat.S_ISDIR(info.st_mode) else 'device or pipe'}, not a file")
    return info.st_size


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    if (size := size_of(path)) > MAX_JSON:
        raise InputError(f"{path} is {size} bytes long, far more than such a file needs: is it another file?")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes, what: str) -> Any:
    """The value that `raw` spells; `what` names it in a sentence. No key of an object may come twice."""

    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise InputError(f"{what} has the key {shown(twice)} twice in one object")
        return value

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise InputError(f"{what} is not valid JSON: {error}") from None


def unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def shown(value: Any, limit: int = 100) -> str:
    """A value from a file as a short piece of one line."""
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."
