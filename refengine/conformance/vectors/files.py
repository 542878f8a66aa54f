"""Sets of vectors on disk: `manifest.json`, and a safetensors or JSON file for each case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from functools import lru_cache
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np

import refengine
from refengine.checkpoint.safetensors_file import SafetensorsFile
from refengine.conformance.vectors import TESTED, Output, Row, Vector, judge, worst_of
from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.untrusted import read_json, shown

FORMAT = "refengine vectors 1"
SHIPPED = Path(__file__).parents[1] / "data" / "vectors"
ALIGN = 64  # bytes; the data of a file begins on such a border
KINDS = DTYPES | {
    name: np.dtype(f"<{name[0].lower()}{int(name[1:]) // 8}") for name in ("I64", "I32", "I16", "I8")
}
KINDS |= {name: np.dtype(f"<u{int(name[1:]) // 8}") for name in ("U64", "U32", "U16", "U8")}
NAMES = {dtype: name for name, dtype in KINDS.items()}
GROUPS = {  # names that --op takes beside those of operations and folders
    "mixers": ("mamba2 mixer", "attention mixer", "experts mixer", "mlp mixer"),
    "states": ("commit", "slots"),
    "sampling": ("sample",),
    "packed": ("pack", "unpack"),
    "texts": ("tokenizer", "chat"),
}


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file; the same arrays give the same bytes."""
    header: dict[str, dict] = {"__metadata__": metadata} if metadata else {}
    end, blocks = 0, []
    for name, a in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        blocks.append(np.ascontiguousarray(a).tobytes())
        begin, end = end, end + a.nbytes
        header[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join([len(raw).to_bytes(8, "little"), raw, *blocks]))


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file; InputError, in a sentence, where it is damaged."""
    file = SafetensorsFile(path)
    try:
        if strange := [at for at in file.tensors.values() if at.dtype not in KINDS]:
            raise InputError(f"{path}: {shown(strange[0].name)} is of the dtype {strange[0].dtype}")
        return {
            at.name: np.frombuffer(at.raw, KINDS[at.dtype], prod(at.shape)).reshape(at.shape)
            for at in file.tensors.values()
        }
    finally:
        file.close()


def entry(vector: Vector) -> dict:
    """Return the manifest's entry of a case."""
    outputs = {
        name: {key: value for key, value in asdict(output).items() if value not in ("", False)}
        | {"tolerance": {dtype: float(f"{output.allowed(dtype):.3g}") for dtype in TESTED}}
        for name, output in vector.outputs.items()
    }
    suffix = "json" if vector.texts else "safetensors"
    parts = {"config": vector.config, "constants": vector.constants, "outputs": outputs}
    return {
        "name": vector.name,
        "operation": vector.operation,
        "file": f"{vector.name}.{suffix}",
        "why": vector.why,
        "seed": vector.seed,
        "sources": vector.sources,
    } | {key: value for key, value in parts.items() if value}


def write(directory: Path, vectors: Iterable[Vector], keep: Iterable[dict] = ()) -> int:
    """Write a set, and return the number of its new cases. The manifest has one case a line, and comes last.

    keep: entries of cases that the directory holds already; they stay in the manifest unless written anew.
    """
    lines, new = [], set()
    for vector in vectors:
        described = entry(vector)
        path = directory / described["file"]
        if vector.texts:
            path.parent.mkdir(parents=True, exist_ok=True)
            body = ",\n".join(json.dumps(text, ensure_ascii=False) for text in vector.texts)
            path.write_text(f"[\n{body}\n]\n", encoding="utf-8")
        else:
            sources = {f"source of {key}": source for key, source in vector.sources.items()}
            about = {"operation": vector.operation, "why": vector.why}
            save(path, vector.arrays, about | sources)
        lines.append(described)
        new.add(vector.name)
    count = len(lines)
    lines = [each for each in keep if each["name"] not in new] + lines
    directory.mkdir(parents=True, exist_ok=True)
    head = f'"format":"{FORMAT}","version":"{refengine.__version__}"'
    body = ",\n".join(json.dumps(each, ensure_ascii=False, separators=(",", ":")) for each in lines)
    (directory / "manifest.json").write_text(f'{{{head},"cases":[\n{body}\n]}}\n', encoding="utf-8")
    return count


def manifest(directory: Path) -> list[dict]:
    """Return the entries of a set's cases; InputError where the directory holds no set of this format."""
    path = directory / "manifest.json"
    value = read_json(path)
    if (
        not isinstance(value, dict)
        or value.get("format") != FORMAT
        or not isinstance(value.get("cases"), list)
    ):
        raise InputError(f"{path} is not the manifest of a set of vectors ({FORMAT!r})")
    if not value["cases"]:
        raise InputError(f"{path} lists no case")
    for number, each in enumerate(value["cases"]):
        for key in ("name", "operation", "file"):
            if not isinstance(each, dict) or not isinstance(each.get(key), str):
                raise InputError(f"{path}: case {number} has no {key}")
        for key in ("name", "file"):
            if not inside(each[key]):
                raise InputError(
                    f"{path}: the {key} {shown(each[key])} leads out of the directory of the set"
                )
    return value["cases"]


def inside(name: str) -> bool:
    """Return whether a relative path stays below the directory that it is relative to."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts) and not name.startswith("/") and ".." not in parts and not any(c in name for c in "\\\0")
    )


def holds_a_set(directory: Path) -> bool:
    """Return whether a directory holds vectors, which are inputs and no outputs."""
    return (directory / "manifest.json").exists()


@contextmanager
def one_case(vector: Vector, directory: Path, what: str) -> Iterator[None]:
    """Turn any error in the body into an InputError, a sentence that names the case; what: computed, say."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{directory}: the case {shown(vector.name)} cannot be {what}: {error}") from None
    except Exception as error:  # of a case that lacks an input, or holds one of another shape
        text = " ".join(str(error).split())[:200]
        reason = f"it lacks {text}" if isinstance(error, KeyError) else f"{type(error).__name__}: {text}"
        raise InputError(f"{directory}: the case {shown(vector.name)} cannot be {what}: {reason}") from error


def read(directory: Path, described: dict) -> Vector:
    """Return one case of a set, by its entry in the manifest."""
    try:
        path = directory / described["file"]
        outputs = {
            name: Output(**{key: value for key, value in output.items() if key != "tolerance"})
            for name, output in described.get("outputs", {}).items()
        }
        about = {key: described[key] for key in ("name", "operation", "why", "seed", "sources")}
        about |= {key: described[key] for key in ("config", "constants") if key in described}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / 'manifest.json'} has a case that is not complete: {error}") from None
    if path.suffix == ".json":
        texts = read_json(path)
        if not isinstance(texts, list) or not texts or not all(isinstance(each, dict) for each in texts):
            raise InputError(f"{path} holds no list of texts")
        return Vector(**about, outputs=outputs, texts=texts)
    arrays = load(path)
    if not outputs:
        raise InputError(f"{directory / 'manifest.json'}: the case {shown(about['name'])} has no outputs")
    for output in outputs.values():
        for key in (output.expected, *filter(None, [output.valid])):
            if key not in arrays:
                raise InputError(f"{path} lacks {shown(key)}, by which the manifest judges its outputs")
    return Vector(**about, outputs=outputs, arrays=arrays)


def vectors(directory: Path, ops: Iterable[str] = ()) -> Iterator[Vector]:
    """Yield the cases of a set, or those of some operations, folders, groups or patterns of names.

    InputError names what there is where one of `ops` is nothing that the set has.
    """
    for described in selected(manifest(directory), ops):
        yield read(directory, described)


def selected(entries: list[dict], ops: Iterable[str]) -> list[dict]:
    """Return the entries that `ops` name: an operation, a folder, a group, or a pattern of case names."""
    ops = list(ops)

    def names(op: str, e: dict) -> bool:
        return (
            op in (e["operation"], e["name"].split("/")[0])
            or e["operation"] in GROUPS.get(op, ())
            or fnmatch(e["name"], op)
        )

    for op in ops:
        if not any(names(op, e) for e in entries):
            known = sorted({e["operation"] for e in entries})
            raise InputError(f"there are no vectors of {shown(op)}; there are those of {', '.join(known)}")
    return [e for e in entries if not ops or any(names(op, e) for op in ops)]


@lru_cache(maxsize=1)
def _shipped_entries() -> dict[str, dict]:
    return {e["name"]: e for e in manifest(SHIPPED)}


@lru_cache(maxsize=128)
def shipped_vector(name: str) -> Vector:
    """Return one case of the shipped set; InputError where it has none of this name."""
    entries = _shipped_entries()
    if name not in entries:
        raise InputError(f"the shipped vectors have no case {shown(name)}")
    return read(SHIPPED, entries[name])


def shipped(names: Iterable[str] | None = None) -> list[Vector]:
    """Return cases of the shipped set: all of them, or those of these names."""
    return [shipped_vector(name) for name in (_shipped_entries() if names is None else names)]


def check_outputs(
    directory: Path, answers: Path, ops: Iterable[str], dtype: str, judge_texts: Callable[[Vector, Path], Row]
) -> list[Row]:
    """Return a row for each case of a set: what another program wrote, judged.

    answers: a directory of files of the same names as the set's, which hold the outputs by their names.
    A case without a file has the note "no file". InputError where there is not one file.
    """
    if not answers.is_dir():
        raise InputError(f"{answers} is not a directory")
    if holds_a_set(answers) and holds_a_set(directory):
        raise InputError(f"{answers} holds vectors, which are inputs: name the directory of the outputs")
    rows = []
    for vector in vectors(directory, ops):
        with one_case(vector, directory, "judged"):
            path = answers / entry(vector)["file"]
            if not path.exists():
                rows.append(Row(vector.operation, vector.name, np.inf, 0.0, "no file"))
            elif vector.texts:
                rows.append(judge_texts(vector, path))
            else:
                rows.append(judge_file(vector, path, dtype))
    if all(row.note == "no file" for row in rows):
        example = next(iter(rows)).case
        raise InputError(f"{answers} holds no outputs: one would be {answers / example}.safetensors")
    return rows


def judge_file(vector: Vector, path: Path, dtype: str) -> Row:
    """Return the row of one case from a file of outputs; a damaged file is a row with its sentence."""
    try:
        found = load(path)
    except InputError as error:
        return Row(vector.operation, vector.name, np.inf, 0.0, str(error))
    return worst_of(judge(vector, {key.removeprefix("out."): a for key, a in found.items()}, dtype))
