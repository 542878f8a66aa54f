"""Candidates: a backend, or functions that take the place of some of NumPy's, in a form that checks can use.

    resolve("torch", dtype="bfloat16")     a backend of refengine
    resolve("mine:OPS")                    an attribute of a module that can be imported from here, or
    resolve("mine.py")                     a module: its functions that have the names of verbs

The attribute is a `Backend`, an `Ops`, a dictionary or an object whose keys or attributes are names of verbs,
or a function that returns one of these. Functions for sampling and text may be among them (TEXT).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refengine import backend as backends
from refengine.conformance.cases import Case
from refengine.spec.config import InputError
from refengine.spec.numerics import wide
from refengine.spec.ops import DEFINITION, REFERENCE, Backend, Ops, numpy_backend, placed_by
from refengine.spec.tensors import placed, table

VERBS = tuple(verb.name for verb in fields(Ops))
TEXT = {
    "probabilities": "(logits [v], sampling, seen) -> probabilities [v] after all filters",
    "draw": "(probabilities [v], generator) -> id",
    "accept": "(p [v] of the trunk, q [v] of the head, draft, generator) -> the draft, or an id in its place",
    "encode": "(text) -> ids, by the tokenizer of the model in the package",
    "decode": "(ids) -> text",
    "render": "(messages, tools, **switches) -> the prompt, by the template of the model in the package",
}
PAIRS = ("rms_norm", "causal_conv", "ssd_scan", "attention", "route")  # verbs that return two results
STATES = {"causal_conv": 3, "ssd_scan": 7, "attention": 3}  # the argument that a verb may write into


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Wrong(AssertionError):
    """A fault that is known to be of one verb; `verb` is its name."""

    def __init__(self, verb: str, what: str):
        super().__init__(what)
        self.verb = verb


@dataclass(frozen=True, repr=False, kw_only=True)
class Bench(Backend):
    """A backend with its dtype, by which a check makes its arrays and judges its errors.

    dtype      of the activations
    functions  those of TEXT that the candidate brings, by name
    brought    names of the verbs and functions that take the place of NumPy's; none of a whole backend
    unused     names of the candidate's public functions that are no verb
    """

    dtype: np.dtype
    functions: Mapping[str, Callable] = field(default_factory=dict, hash=False, compare=False)
    brought: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Return a sentence for the user about the functions that are not used; none without such."""
        if not self.unused:
            return []
        several = len(self.unused) > 1
        what = f"function{'s' if several else ''} that {'are' if several else 'is'} no verb"
        return [f"{self.name} has {what} and not checked: {with_near(self.unused)}"]

    def __repr__(self) -> str:
        return f"BENCHES[{self.name!r}]()"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))

    def give(self, *arrays: np.ndarray):
        """Return activations here, of arrays on the host, in the dtype of the computation."""
        given = [self.array(np.asarray(a).astype(self.dtype)) for a in arrays]
        return given if len(given) > 1 else given[0]

    def exact(self, a: np.ndarray) -> np.ndarray:
        """Return an array as the dtype of the computation holds it, in float64."""
        return np.asarray(a).astype(self.dtype).astype(np.float64)

    def result(self, a, what: str = "result", wider: bool = False) -> np.ndarray:
        """Return an activation on the host; AssertionError if its dtype is not that of the computation.

        A result may be in float32 where the computation is in bfloat16 or float16; with `wider` it has to be.
        """
        given, a, due = a, self.fetch(a), {self.dtype, wide(self.dtype)}
        if wider:
            due = {wide(self.dtype)}
        if a.dtype == object or not hasattr(given, "dtype"):
            raise AssertionError(f"{what}: {type(given).__name__}, where an array is due")
        if a.dtype not in due:
            raise AssertionError(f"{what}: {a.dtype}, where {' or '.join(sorted(map(str, due)))} is due")
        return a

    def weights(self, cfg, read, block: str = "layers.0", experts: range | None = None) -> dict[str, Any]:
        """Return the placed weights of one mixer; `read(name)` is a tensor in the file's dtype.

        experts: the routed experts to place, as a rank that has no others would; None: all.
        """
        rows = [row for row in table(cfg) if row.block == block and row.key.startswith("mixer.")]
        if experts is not None:
            routed = [row for row in rows if row.role == "routed_expert"]
            rows = [row for row in rows if row not in routed or int(row.key.split(".")[2]) in experts]
        weights = placed(rows, lambda group: placed_by(self, group, [read(row.name) for row in group.rows]))
        return weights[block]["mixer"]

    def weight(self, cfg, read, name: str):
        """Return the placed group of the model that has the tensor `name`."""
        from refengine.spec.tensors import groups

        group = next(g for g in groups(table(cfg)) if name in [row.name for row in g.rows])
        return placed_by(self, group, [read(row.name) for row in group.rows])

    def state(self, kind: str, cfg, batch: int, **values):
        """Return an empty state, or one with these values (of S, say) in it."""
        state = self.new_state(kind, cfg, batch)
        wider = wide(self.dtype)
        held = {key: self.array(v.astype(wider if key == "S" else self.dtype)) for key, v in values.items()}
        return type(state)(**(vars(state) | held)) if held else state


def bench(name: str, backend: Backend, dtype, functions: Mapping[str, Callable] | None = None) -> Bench:
    """Return a backend as a Bench of this name and dtype."""
    kept = {f.name: getattr(backend, f.name) for f in fields(Backend)}
    return Bench(**kept | {"name": name, "dtype": np.dtype(dtype), "functions": functions or {}})


def near(name: str) -> str:
    """Return the verb or function whose name is nearest to another; "" without one."""
    return next(iter(difflib.get_close_matches(name, (*VERBS, *TEXT), 1)), "")


def with_near(names: tuple[str, ...], most: int = 8) -> str:
    """Return names, those first that are near to a verb's, which is named with them."""
    ordered = sorted(names, key=lambda name: not near(name))
    listed = [f"{name} (did you mean {near(name)}?)" if near(name) else name for name in ordered[:most]]
    return ", ".join(listed) + (f", and {len(names) - most} more" if len(names) > most else "")


def with_functions(functions: Mapping[str, Callable], dtype="float32", name: str = "candidate") -> Bench:
    """Return the NumPy backend with these verbs for its own, each watched; InputError for other names.

    Functions read arrays: packed weights are dequantized first.
    """
    for verb in functions:
        if verb not in VERBS and verb not in TEXT:
            known = f"; there is {', '.join((*VERBS, *TEXT))}"
            hint = f"; did you mean {near(verb)}?" if near(verb) else known
            raise InputError(f"there is no verb {verb!r}{hint}")
        if not callable(functions[verb]):
            raise InputError(f"{verb} is {type(functions[verb]).__name__}, not a function")
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise InputError(f"functions over NumPy arrays are checked in float32 or float64, not in {dtype}")
    backend = numpy_backend(np.dtype(dtype), ops=REFERENCE)
    verbs = {verb: watched(verb, f) for verb, f in functions.items() if verb in VERBS}
    text = {name: f for name, f in functions.items() if name in TEXT}
    made = bench(name, replace(backend, ops=replace(backend.ops, **verbs), packed=False), dtype, text)
    return replace(made, brought=tuple(functions))


def watched(verb: str, function: Callable) -> Callable:
    """Return the verb, which raises Wrong where it raises, changes what it reads, or returns no pair."""

    def call(*args, **how):
        kept = [a.copy() if isinstance(a, np.ndarray) else None for a in args]
        try:
            result = function(*args, **how)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                raise  # the user's own
            text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            raise Wrong(verb, f"{verb} raised {text}") from error
        for i, (before, after) in enumerate(zip(kept, args, strict=True)):
            if before is not None and i != STATES.get(verb) and not same_bits(before, after):
                raise Wrong(verb, f"{verb} changed its argument {i + 1}, {before.dtype} {list(before.shape)}")
        if verb in PAIRS and not (isinstance(result, tuple) and len(result) == 2):
            given = f"{len(result)} results" if isinstance(result, tuple) else type(result).__name__
            raise Wrong(verb, f"{verb} returned {given}, where two results are due")
        return result

    return call


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays hold the same bytes."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def resolve(
    name: str, dtype: str | None = None, device: str | None = None, deterministic: bool = False
) -> Bench:
    """Return the candidate called `name`: a backend of refengine, "definition", or module[:attribute].

    dtype      of the computation; None: float32
    device     as for `refengine.load`

    InputError, in one sentence, where there is no such candidate.
    """
    if name in backends.NAMES:
        made = backends.make(name, Case().cfg, dtype or "float32", device, None, deterministic)
        return bench(name, made, computed(made))
    if name == "definition":
        return bench(name, numpy_backend(dtype or "float32", ops=DEFINITION), dtype or "float32")
    if ":" not in name and not name.endswith(".py") and not found(name):
        known = ", ".join((*backends.NAMES, "definition"))
        raise InputError(f"there is no backend {name!r}; there is {known}, or MODULE:ATTRIBUTE of your own")
    return candidate(loaded(name), dtype, device, name)


def found(module: str) -> bool:
    """Return whether a module of this name can be imported from the current folder."""
    with_here()
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def with_here() -> None:
    """Let modules be imported from the current folder."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())


def loaded(name: str):
    """Return module:attribute, or the module; InputError where it cannot be imported."""
    with_here()
    module_name, _, attribute = name.partition(":") if not Path(name).is_file() else (name, "", "")
    if not module_name.strip("."):
        raise InputError(f"{name!r} names no module: an own backend is FILE.py, MODULE or MODULE:ATTRIBUTE")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            if spec is None or spec.loader is None or not Path(module_name).is_file():
                raise InputError(f"there is no file {module_name}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a module may fail in any way
        text = " ".join(str(error).split())
        raise InputError(f"{module_name} cannot be imported: {type(error).__name__}: {text}") from error
    value = module
    for part in filter(None, attribute.split(".")):
        if not hasattr(value, part):
            raise InputError(f"{module_name} has no attribute {attribute!r}")
        value = getattr(value, part)
    return value


def candidate(value, dtype: str | None = None, device: str | None = None, name: str = "candidate") -> Bench:
    """Return a candidate of a Bench, a Backend, an Ops, functions by name, or a function that returns one."""
    if isinstance(value, Bench):
        return value
    if isinstance(value, Backend):
        return bench(name, value, computed(value))
    if isinstance(value, Ops):
        return with_functions(dict(value), dtype or "float32", name)
    if isinstance(value, Mapping):
        return with_functions(value, dtype or "float32", name)
    if callable(value) and not inspect.isclass(value) and not inspect.ismodule(value):
        if getattr(value, "__name__", "") in (*VERBS, *TEXT):
            return with_functions({value.__name__: value}, dtype or "float32", name)
        takes = inspect.signature(value).parameters
        if needed := [p.name for p in takes.values() if p.default is p.empty and p.kind in POSITIONAL]:
            what = f"{name} takes {', '.join(needed)}, so it returns no candidate by itself"
            raise InputError(f"{what}; a verb has the name of a verb, or is in a dictionary under one")
        how = {key: v for key, v in (("dtype", dtype), ("device", device)) if v is not None and key in takes}
        return candidate(value(**how), dtype, device, name)
    functions = {verb: getattr(value, verb) for verb in (*VERBS, *TEXT) if hasattr(value, verb)}
    if inspect.ismodule(value):  # what it imports from the book for its own use is not its own
        functions = {verb: f for verb, f in functions.items() if not of_the_book(f, value)}
    unused = tuple(public(value))
    if not functions:
        there = f"; it has {with_near(unused)}" if unused else ""
        what = f"is no Backend, and has no function with the name of a verb: {', '.join(VERBS)}"
        raise InputError(f"{name} {what}{there}")
    return replace(with_functions(functions, dtype or "float32", name), unused=unused)


def of_the_book(function, module) -> bool:
    """Return whether a module has imported a function from the specification."""
    home = getattr(function, "__module__", None) or ""
    return home.startswith("refengine.spec.") and home != module.__name__


def public(value) -> list[str]:
    """Return the names of the public functions that a module, a class or an object defines, without verbs."""
    there = dict(getattr(value, "__dict__", {}))
    if not inspect.ismodule(value) and not inspect.isclass(value):
        there |= vars(type(value))
    found = []
    for name, f in there.items():
        f = f.__func__ if isinstance(f, (staticmethod, classmethod)) else f
        own = not inspect.ismodule(value) or getattr(f, "__module__", "") == value.__name__
        if inspect.isfunction(f) and own and not name.startswith("_") and name not in (*VERBS, *TEXT):
            found.append(name)
    return found


def computed(backend: Backend) -> np.dtype:
    """Return the dtype of a backend's activations: that of its embedding of a token."""
    from refengine.spec.model import Model

    case = Case(layers="-")
    try:
        x = Model.build(case.cfg, case.read, backend).embed(backend.array(np.zeros((1, 1), np.int64)))
        return np.dtype(backend.fetch(x).dtype)
    except Exception as error:
        text = " ".join(str(error).split())
        raise InputError(f"the backend cannot embed a token: {type(error).__name__}: {text}") from error


def numpy_bench(dtype: str, ops: Ops = REFERENCE, word: str = "numpy") -> Bench:
    """Return the NumPy backend with these verbs, as a Bench."""
    return bench(f"{word}-{dtype}", numpy_backend(dtype, ops=ops), dtype)


BUILT_IN: dict[str, Callable[[], Bench]] = {
    "numpy-float32": partial(numpy_bench, "float32"),
    "numpy-float64": partial(numpy_bench, "float64"),
    "definition-float32": partial(numpy_bench, "float32", DEFINITION, "definition"),
    "definition-float64": partial(numpy_bench, "float64", DEFINITION, "definition"),
}
