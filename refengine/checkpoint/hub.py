"""Models in the local Hugging Face cache: found by their name, without the network.

$HF_HUB_CACHE, or $HF_HOME/hub, or ~/.cache/huggingface/hub
  models--OWNER--NAME/
    refs/main             the commit of a branch or tag
    snapshots/COMMIT/     the files of a commit, as links
"""

from __future__ import annotations

import os
import re
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?:@[\w.-]+)?")


def cache_directory() -> Path:
    """Return where huggingface_hub keeps models, by the same environment variables."""
    for name, *below in (("HF_HUB_CACHE",), ("HUGGINGFACE_HUB_CACHE",), ("HF_HOME", "hub")):
        if value := os.environ.get(name):
            return Path(os.path.expandvars(value)).expanduser().joinpath(*below)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "huggingface" / "hub"


def cached(name: str) -> Path | None:
    """Return the directory of OWNER/NAME or OWNER/NAME@REVISION in the cache; None where it is not there."""
    if not NAME.fullmatch(name):
        return None
    name, _, revision = name.partition("@")
    return snapshot(cache_directory() / f"models--{name.replace('/', '--')}", revision or "main")


def snapshot(folder: Path, revision: str = "main") -> Path | None:
    """Return the directory with the files of a model's folder in the cache; None where there is none.

    Without the branch that is asked for (main), the newest snapshot that has a config.json counts.
    """
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    if re.fullmatch(r"[\w.-]+", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    if revision != "main":
        return None
    try:
        found = [path for path in snapshots.iterdir() if (path / "config.json").exists()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None
