"""Read files from unknown sources: the kind and the size of a file are checked before its contents are used.

Every fault becomes an InputError: one sentence that names the file. `shown` formats a value from a file for a
sentence: on one line, and short for any value.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from refengine.spec.config import InputError

MAX_JSON = 64 * 2**20  # bytes; the largest config.json and index in use are below 20 MB


def size_of(path: Path) -> int:
    """Return the bytes in a file; InputError for a directory, a pipe (it would block), a link to nothing."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
        raise InputError(f"{path} {what}") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(info.st_mode):
        what = "directory" if stat.S_ISDIR(info.st_mode) else "device or pipe"
        raise InputError(f"{path} is a {what}, where a file is expected")
    return info.st_size


def read_json(path: Path) -> Any:
    """Return the value in a JSON file."""
    if (size := size_of(path)) > MAX_JSON:
        raise InputError(f"{path} is {size} bytes long, far more than it needs to be: is it another file?")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_json(raw, str(path))


def parse_json(raw: bytes, what: str) -> Any:
    """Return the value that JSON text spells; a byte-order mark is skipped.

    what: names it in a sentence. Raises InputError, also for an object that has a key twice.
    """

    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise InputError(f"{what} has the key {shown(twice)} twice in one object")
        return value

    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text (at byte {error.start})") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise InputError(f"{what} is not valid JSON: {error}") from None


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a file that cannot be read."""
    return InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def shown(value: Any) -> str:
    """Return a value from a file as a short piece of one line."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxstring = 2, 8, 100
    return short.repr(value)
