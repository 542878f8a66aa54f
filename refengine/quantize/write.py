"""Write a quantized copy of a checkpoint, strip by strip: the memory does not depend on the model.

Each file gets its name when it is whole, and config.json comes last, so a directory never holds half a model.
After a kill at any moment the same command continues: complete files are kept, with their errors, which
are in STATE until the end. One process at a time writes into a directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

import numpy as np

from refengine.checkpoint import INDEX, Checkpoint
from refengine.checkpoint.packed import KINDS, Unread
from refengine.checkpoint.safetensors_file import BITS
from refengine.checkpoint.write import ALIGN
from refengine.quantize.calibrate import calibrate, scale_of_cache
from refengine.quantize.recipes import FORMATS, SEARCHED, Format, Recipe
from refengine.spec.config import InputError
from refengine.spec.quant import E4M3, E4M3_MAX, Packed, nvfp4, to_e4m3
from refengine.spec.tensors import Tensor, groups, table

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STATE = ".quantize.json"
STRIP = 2**18  # elements that are packed at once: their arrays of float32 stay in a processor's cache
SHARD = 5 * 10**9  # bytes of a file, about
WRITTEN = (INDEX, "config.json", "hf_quant_config.json")  # not copied
TEXTS = (".json", ".jinja", ".model", ".txt", ".md", ".py")  # .py: config.json may name classes in them
TEMPLATES = "additional_chat_templates"  # a directory of .jinja files, copied too
ON_QKV = "qkv_proj"  # q, k and v are one matrix to modelopt: they share scale_2, but not the scale of FP8


@dataclass(frozen=True)
class Job:
    """Holds a row of the table, its format or None, and the rows whose largest magnitude it shares.

    scales: the values of the single scales that calibration adds, by the names of their tensors
    """

    row: Tensor
    format: Format | None
    sharing: tuple[Tensor, ...]
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        """Return the name of the format in modelopt's metadata, "" where there is none."""
        found = self.format.algorithm if self.format else ""
        return "NVFP4" if found == "W4A16_NVFP4" and f"{self.base}.input_scale" in self.scales else found

    @property
    def base(self) -> str:
        """Return the name of the module."""
        return self.row.name.removesuffix(".weight")

    def tensors(self, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return the name, dtype and shape of each tensor that it becomes; `dtype` is that of the source."""
        name, shape = self.row.name, self.row.shape
        added: list = [(each, "F32", ()) for each in self.scales]
        if self.format is None:
            return [(name, dtype, shape), *added]
        base, (rows, columns) = self.base, shape
        blocks = (rows, columns // self.format.block)
        match self.format.kind:
            case "NVFP4":
                scales = [("weight_scale", "F8_E4M3", blocks), ("weight_scale_2", "F32", ())]
                codes: tuple = (name, "U8", (rows, columns // 2))
            case "MXFP8":
                codes, scales = (name, "F8_E4M3", shape), [("weight_scale", "U8", blocks)]
            case _:
                codes, scales = (name, "F8_E4M3", shape), [("weight_scale", "F32", ())]
        return [codes] + [(f"{base}.{end}", kind, each) for end, kind, each in scales] + added


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    shard: int = SHARD,
    strip: int = STRIP,
    texts: Sequence[str] | None = None,
    advance: Callable[[int], object] = lambda elements: None,
) -> dict[str, dict[str, float]]:
    """Write a quantized copy of a model into the directory `out`; return errors by role.

    The errors of a role are {"matrices", "bits", "error", "gain"}: bits an element with scales, the median
    over matrices of the squared error over the squared weights, and how much smaller that is than with NVFP4
    without four over six. `advance` is called with the number of elements that were done. With `texts` the
    model reads them first, and scales of inputs and, where the recipe asks for it, of the cache are written.
    Raises InputError.
    """
    source, out = Checkpoint.open(model), Path(out)
    np.empty(2**24, np.uint8)  # freed at once: glibc then keeps up to 2**25 freed bytes for the next strips
    jobs = plan(source, recipe)
    _check_target(source, out)
    if texts is not None:
        _check_calibration(jobs, recipe)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            state = _state(source, out, recipe, texts, shard)
            if texts is not None:
                if "largest" not in state:
                    state["largest"] = calibrate(source, texts)
                    _text(out / STATE, json.dumps(state))
                jobs = [calibrated(job, recipe, state["largest"]) for job in jobs]
            files = _shards(source, jobs, shard)
            for name, members in files.items():
                if name not in state["errors"] or not (out / name).exists():
                    errors = _write(source, out / name, members, strip, advance)
                    state["errors"][name] = errors
                    _text(out / STATE, json.dumps(state))
                else:
                    advance(sum(job.row.size for job in members))
            _finish(source, out, jobs, files)
    except OSError as error:
        goes_on = "; the same command goes on from here" if (out / STATE).exists() else ""
        raise InputError(f"cannot write {out}: {error.strerror}{goes_on}") from None
    finally:
        source.close()
    return _report(state["errors"])


def plan(source: Checkpoint, recipe: Recipe) -> list[Job]:
    """Return what becomes of each tensor; InputError names one that does not fit its format."""
    cfg = source.config
    if source.directory.is_file():
        raise InputError(f"{source.directory} is a GGUF file: quantize the directory that it was made from")
    if packed := [name for name, at in source.stored.items() if at.dtype in KINDS]:
        what = f"{source.directory} is packed already ({packed[0]} is {source.stored[packed[0]].dtype})"
        raise InputError(f"{what}: quantize the original")
    jobs = []
    for group in groups(table(cfg)):
        formats = [FORMATS.get(recipe.format_of(row, cfg)) for row in group.rows]
        for row, chosen in zip(group.rows, formats, strict=True):
            if chosen and len(row.shape) != 2:
                raise InputError(f"recipe {recipe.name}: {row.name} is not a matrix")
            if chosen and row.shape[1] % max(2, chosen.block):
                what = f"{row.name} has {row.shape[1]} columns, which are not whole blocks of {chosen.block}"
                raise InputError(f"recipe {recipe.name}: {what}")
            share = group.name == ON_QKV and chosen and chosen.kind == "NVFP4" and len(set(formats)) == 1
            jobs.append(Job(row, chosen, tuple(group.rows) if share else (row,)))
    if not any(job.format for job in jobs):
        raise InputError(f"recipe {recipe.name} leaves every weight of {source.directory} as it is")
    return jobs


def copied(source: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Return what a copy by a recipe would hold, as a checkpoint that can be described and not read."""
    jobs = {job.row.name: job for job in plan(source, recipe)}
    stored = {
        name: Unread(name, job.format.kind if job.format else at.dtype, job.row.shape, _bytes_of(source, job))
        for name, at in source.stored.items()
        for job in [jobs[name]]
    }
    return replace(source, files=(), stored=stored)


def _check_calibration(jobs: list[Job], recipe: Recipe) -> None:
    """Raise InputError where calibration has nothing to write, or cannot reach a matrix."""
    packed = [job for job in jobs if job.format and recipe.packs_inputs(job.format)]
    if not packed and not recipe.packs_cache:
        raise InputError(
            f"recipe {recipe.name} has no scales of inputs or of the cache: nothing to calibrate"
        )
    for job in packed:
        if job.row.role == "embedding" or job.row.block.startswith("mtp."):
            raise InputError(f"recipe {recipe.name} packs {job.row.name}, whose inputs are not calibrated")


def calibrated(job: Job, recipe: Recipe, largest: Mapping[str, float]) -> Job:
    """Return a job with the scales of its inputs, and of the keys or values that it makes.

    largest: as `calibrate` returns it. A magnitude of 0 gives the scale 1, so that no reader divides by 0.
    """
    found: dict[str, float] = {}
    if job.format and recipe.packs_inputs(job.format):
        found[f"{job.base}.input_scale"] = largest[job.row.name] / job.format.inputs or 1.0
    name = scale_of_cache(job.row)
    if name is not None and recipe.packs_cache and name in largest:
        found[name] = largest[name] / E4M3_MAX or 1.0
    return replace(job, scales=found)


def _check_target(source: Checkpoint, out: Path) -> None:
    """Raise InputError where writing would lose something."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a directory")
    if out.exists() and out.resolve() == source.directory.resolve():
        raise InputError(f"{out} is the model itself: give another directory")
    if not out.exists() or (out / STATE).exists():
        return
    if there := sorted({*os.listdir(out)} - {_partial(out / STATE).name}):
        raise InputError(f"{out} holds {there[0]} already: give a new directory")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock a directory; InputError if another process writes there. Without locks on this system, nothing."""
    if fcntl is None:
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing {out}") from None
        yield
    finally:
        os.close(handle)


def _state(
    source: Checkpoint, out: Path, recipe: Recipe, texts: Sequence[str] | None, shard: int
) -> dict[str, Any]:
    """Return the state of an earlier run, or a new one; InputError if that was of another model or recipe.

    A run that was stopped before anything was found or written leaves nothing to go on with.
    """
    digest = None if texts is None else sha256(json.dumps(list(texts)).encode()).hexdigest()
    wanted: dict[str, Any] = {
        "source": source.digest(),
        "roles": dict(recipe.roles),
        "names": dict(recipe.names),
    }
    wanted |= {"name": recipe.name, "before_attention": recipe.before_attention, "texts": digest}
    wanted |= {"shard": shard}
    try:
        found = json.loads((out / STATE).read_text())
    except FileNotFoundError:
        found = {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key, {}), dict) for key in ("errors", "largest")
    ):
        raise InputError(f"{out / STATE} is damaged: remove {out} and begin again")
    if not found.get("errors") and "largest" not in found:
        found = wanted | {"errors": {}}
        _text(out / STATE, json.dumps(found))
    if {key: found.get(key) for key in wanted} != wanted:
        raise InputError(f"{out} holds a part of another model or recipe: give a new directory")
    return found


def _partial(path: Path) -> Path:
    """Return the name of a file until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when it is whole, and is removed on an error."""
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with _whole(path) as file:
        file.write(text.encode())


def _bytes_of(source: Checkpoint, job: Job) -> int:
    tensors = job.tensors(source.stored[job.row.name].dtype)
    return sum(prod(shape) * BITS[dtype] // 8 for _, dtype, shape in tensors)


def _shards(source: Checkpoint, jobs: list[Job], size: int) -> dict[str, list[Job]]:
    """Return {file name: its jobs}, runs of the list of about `size` bytes."""
    runs: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        nbytes = _bytes_of(source, job)
        if runs[-1] and held + nbytes > size:
            runs.append([])
            held = 0
        runs[-1].append(job)
        held += nbytes
    if len(runs) == 1:
        return {"model.safetensors": runs[0]}
    return {f"model-{i:05}-of-{len(runs):05}.safetensors": run for i, run in enumerate(runs, 1)}


def _write(source: Checkpoint, path: Path, jobs: list[Job], strip: int, advance) -> list[list]:
    """Write one file; return [role, elements, bytes, error, error without four over six] of each matrix."""
    tensors = [each for job in jobs for each in job.tensors(source.stored[job.row.name].dtype)]
    tensors.sort(key=lambda each: -BITS[each[1]])  # wide dtypes first, so that every tensor is aligned
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        at[name] = begin
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGN)
    errors = []
    with _whole(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)

        def put(name: str, offset: int, values: np.ndarray) -> None:
            raw_values = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            if raw_values.any():  # zeros stay a hole
                file.seek(8 + len(raw) + at[name] + offset)
                file.write(raw_values.data)

        for job in jobs:
            errors += _put(source, job, strip, put, advance)
    return errors


def _put(source: Checkpoint, job: Job, strip: int, put, advance) -> list[list]:
    """Write the tensors of one job; return its errors."""
    row, chosen = job.row, job.format
    for name, scale in job.scales.items():
        put(name, 0, np.array(scale, np.float32))
    if chosen is None:
        for begin, part in _strips(source, row, strip):
            put(row.name, begin * part[0].nbytes, part)
            advance(part.size)
        return []
    base = job.base
    amax = np.float32(0)
    for each in job.sharing:
        for _, part in _strips(source, each, strip):
            amax = np.maximum(amax, _largest(part))  # a NaN stays
    if not np.isfinite(amax):
        raise InputError(f"{row.name} of {source.directory} holds a number that is not finite")
    if chosen is SEARCHED:
        amax = amax * np.float32(_factor(source, row, strip, amax))
        weight: Any = source.read(row.name)
        amax = np.float32(amax.astype(weight.dtype))  # as modelopt keeps it
    squares, lost, plainly = 0.0, 0.0, 0.0
    packed: Packed | None = None
    for begin, part in _strips(source, row, strip):
        packed = chosen.pack(part, amax)
        put(row.name, begin * packed.codes[0].nbytes, packed.codes)
        if packed.scale.ndim:
            put(f"{base}.weight_scale", begin * packed.scale[0].nbytes, packed.scale)
        exact = part.astype(np.float32)
        squares += _squares(exact)
        lost += _squares(packed.dequantize() - exact)
        plainly += _squares(nvfp4(part, amax).dequantize() - exact) if _adaptive(chosen) else 0.0
        advance(part.size)
    assert packed is not None
    if chosen.kind == "FP8":
        put(f"{base}.weight_scale", 0, packed.scale)
    if packed.scale_2 is not None:
        put(f"{base}.weight_scale_2", 0, np.array(packed.scale_2))
    nbytes = _bytes_of(source, job)
    relative = [each / squares if squares else 0.0 for each in (lost, plainly)]
    return [[row.role, row.size, nbytes, *relative]]


def _factor(source: Checkpoint, row: Tensor, strip: int, amax) -> float:
    """Return 1 or 1.5: how many times amax has to be for the smaller squared error in FP8."""
    errors = []
    for factor in (1, 1.5):
        up = np.float32(1) / (amax * np.float32(factor)) * np.float32(E4M3_MAX) if amax else np.float32(1)
        error = 0.0
        for _, part in _strips(source, row, strip):
            exact = part.astype(np.float32)
            codes = to_e4m3((exact * up).clip(-E4M3_MAX, E4M3_MAX))
            error += _squares((exact - E4M3[codes] * (1 / up)).astype(np.float64))
        errors.append(error)
    return 1.5 if errors[1] < errors[0] else 1


def _adaptive(chosen: Format) -> bool:
    return chosen is FORMATS["four_over_six"]


def _largest(x: np.ndarray) -> np.float32:
    """Return the largest magnitude, by the bits without the sign: NumPy has no fast loops for bfloat16.

    Magnitudes have the order of their bits, and a NaN is above infinity.
    """
    bits = x.view(f"u{x.itemsize}") & (2 ** (8 * x.itemsize - 1) - 1)
    return np.float32(np.array(bits.max(initial=0), bits.dtype).view(x.dtype))


def _squares(x: np.ndarray) -> float:
    return float(np.dot(x.reshape(-1), x.reshape(-1)))


def _strips(source: Checkpoint, row: Tensor, strip: int) -> Iterator[tuple[int, Any]]:
    """Yield (first row, rows) of a tensor, of at most `strip` elements where a row has no more.

    The memory that reading a strip filled is given back after it.
    """
    whole: Any = source.read(row.name)
    if whole.ndim == 0:
        yield 0, whole.reshape(1)
        return
    at = source.stored[row.name]
    step = max(1, strip // max(1, prod(whole.shape[1:])))
    for begin in range(0, len(whole), step):
        yield begin, whole[begin : begin + step]
        at.release()


def _finish(source: Checkpoint, out: Path, jobs: list[Job], files: dict[str, list[Job]]) -> None:
    """Write the index, the metadata, copies of the other files, and config.json last."""
    if len(files) > 1:
        names = {
            name: file
            for file, members in files.items()
            for job in members
            for name, *_ in job.tensors(source.stored[job.row.name].dtype)
        }
        total = sum(_bytes_of(source, job) for job in jobs)
        _text(
            out / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n"
        )
    named = (source.directory / TEMPLATES).glob("*.jinja")
    for path in sorted([*source.directory.iterdir(), *named]):
        if path.is_file() and path.name.endswith(TEXTS) and path.name not in WRITTEN:
            copy = out / path.relative_to(source.directory)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    said = metadata(jobs)
    _text(out / "hf_quant_config.json", json.dumps(said, indent=2) + "\n")
    config = json.loads((source.directory / "config.json").read_bytes().decode("utf-8-sig"))
    config.pop("compression_config", None)
    if said["quantization"]["kv_cache_quant_algo"]:
        said["quantization"]["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    config["quantization_config"] = said["quantization"] | {
        "quant_method": "modelopt",
        "producer": said["producer"],
        "ignore": said["quantization"]["exclude_modules"],
    }
    _text(out / "config.json", json.dumps(config, indent=2) + "\n")
    (out / STATE).unlink()


def metadata(jobs: list[Job]) -> dict[str, Any]:
    """Return hf_quant_config.json: one algorithm and its exclusions, or the algorithm of each module."""
    from refengine import __version__

    packed = {job.base: (job.algorithm, job.format) for job in jobs if job.format}
    plain = [job.base for job in jobs if not job.format and len(job.row.shape) == 2]
    cached = any(scale_of_cache(job.row) in job.scales for job in jobs)
    said: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8" if cached else None}
    if len({algorithm for algorithm, _ in packed.values()}) == 1:
        (algorithm, chosen), *_ = packed.values()
        said["quant_algo"] = algorithm
        said |= {"group_size": chosen.block} if chosen.kind != "FP8" else {}
    else:
        said["quantized_layers"] = {
            name: {"quant_algo": algorithm} | ({"group_size": each.block} if each.kind != "FP8" else {})
            for name, (algorithm, each) in packed.items()
        }
    said["exclude_modules"] = plain
    return {"producer": {"name": "refengine", "version": __version__}, "quantization": said}


def _report(errors: dict[str, list]) -> dict[str, dict[str, float]]:
    """Return the errors by role, over the matrices of all files."""
    by_role: dict[str, list] = {}
    for entries in errors.values():
        for role, *rest in entries:
            by_role.setdefault(role, []).append(rest)
    out = {}
    for role, entries in by_role.items():
        elements, nbytes, lost, plainly = zip(*entries, strict=True)
        found, without = median(lost), median(plainly)
        gain = 1 - found / without if without else 0.0
        bits = 8 * sum(nbytes) / sum(elements)
        out[role] = {"matrices": len(entries), "bits": bits, "error": found, "gain": gain}
    return out
