"""Models in the local Hugging Face cache: found by their name, without the network.

$HF_HUB_CACHE, or $HF_HOME/hub, or ~/.cache/huggingface/hub
  models--OWNER--NAME/
    refs/main             the commit of a branch or tag
    refs/refs/pr/1        the commit of a pull request, whose revision is refs/pr/1
    snapshots/COMMIT/     the files of a commit, as links
"""

from __future__ import annotations

import os
import re
from pathlib import Path

NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?")


def cache_directory() -> Path:
    """Return where huggingface_hub keeps models, by the same environment variables."""
    for name, *below in (("HF_HUB_CACHE",), ("HUGGINGFACE_HUB_CACHE",), ("HF_HOME", "hub")):
        if value := os.environ.get(name):
            return Path(os.path.expandvars(value)).expanduser().joinpath(*below)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "huggingface" / "hub"


def cached(name: str) -> Path | None:
    """Return the directory of OWNER/NAME or OWNER/NAME@REVISION in the cache; None where it is not there.

    A revision is a branch, a tag, a commit, or a pull request (refs/pr/1).
    """
    if not (found := NAME.fullmatch(name)):
        return None
    return snapshot(folder_of(found[1]), found[2] or "main")


def folder_of(name: str) -> Path:
    """Return the folder of OWNER/NAME in the cache, whether or not it is there."""
    return cache_directory() / f"models--{name.replace('/', '--')}"


def revisions(name: str) -> list[str]:
    """Return the revisions of OWNER/NAME in the cache: branches, tags and pull requests, else commits."""
    refs, snapshots = folder_of(name) / "refs", folder_of(name) / "snapshots"
    try:
        named = [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()]
        named = [revision for revision in named if snapshot(folder_of(name), revision)]
        return sorted(named) or sorted(path.name for path in snapshots.iterdir())
    except OSError:
        return []


def models() -> list[str]:
    """Return the names of the models in the cache."""
    try:
        folders = [path.name for path in cache_directory().iterdir() if (path / "snapshots").is_dir()]
    except OSError:
        return []
    parts = [folder.split("--", 2) for folder in sorted(folders) if folder.count("--") >= 2]
    return [f"{owner}/{name}" for kind, owner, name in parts if kind == "models"]


def snapshot(folder: Path, revision: str = "main") -> Path | None:
    """Return the directory with the files of a model's folder in the cache; None where there is none.

    Without the branch that is asked for (main), the newest snapshot that has a config.json counts.
    """
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    if re.fullmatch(r"[\w-][\w.-]*", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    if revision != "main":
        return None
    try:
        found = [path for path in snapshots.iterdir() if (path / "config.json").exists()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    except OSError:
        return None
