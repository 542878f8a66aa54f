"""Functions and structures that Python and the C++ loops share, and a check that both declarations agree.

A missing argument or field would make C++ read unrelated memory without an error. So the library
describes its own functions and structures (kernels/interface.cpp), and `declared` compares them with these
tables when it is loaded.
"""

from __future__ import annotations

import ctypes
from itertools import zip_longest

from refengine.spec.config import InputError

KINDS: dict[str, type] = {
    "pointer": ctypes.c_void_p, "int64": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float,
}  # fmt: skip
SHORT = {"p": "pointer", "i": "int64", "n": "int", "f": "float"}
SIGNATURES = {
    "linear": "piipipip",
    "mlp": "ppiipipp",
    "experts": "ppiippiiiippp",
    "rms_norm": "pppfppiip",
    "gated_rms_norm": "ppipfpiiip",
    "conv": "pippppppiiiip",
    "choose": "ppiiiiinfppp",
    "scan": "pppppipippipipppffpiiiiiiip",
    "attend": "pippfpiiiiip",
    "step": "pppppppnpppp",
    "replay": "pppppp",
}
FIELDS = {
    "Run": "threads:n steady:n planes:n",
    "Matrix": "at:p kind:i scale:p factor:f",
    "Norm": "weight:p d:i eps:f",
    "Mamba": "norm:Norm in_proj:Matrix out_proj:Matrix conv:p conv_bias:p A_log:p D:p dt_bias:p gate:p "
    "heads:i head_dim:i groups:i state:i kernel:i low:f high:f",
    "Attention": "norm:Norm q:Matrix k:Matrix v:Matrix o:Matrix heads:i kv:i head_dim:i scale:f",
    "Experts": "norm:Norm gate:p bias:p shared_up:Matrix shared_down:Matrix fc1:Matrix fc2:Matrix "
    "up:p down:p count:i chosen:i groups:i kept:i width:i shared_width:i latent:i "
    "normalise:n factor:f",
    "Dense": "norm:Norm up:Matrix down:Matrix width:i",
    "Layer": "kind:i weights:p",
    "Model": "norm:Norm head:Matrix vocabulary:i count:i layers:p",
    "Page": "k:p v:p step:i",
    "Cache": "pages:p count:i each:i kind:i k_scale:f v_scale:f",
    "State": "tail:p S:p cache:p key:p read:p",
    "Sequences": "b:i rows:i count:p length:p",
}


def fields(text: str) -> list[tuple[str, str]]:
    """Return (name, kind) of each field of a text "name:kind ..."."""
    pairs = [field.split(":") for field in text.split()]
    return [(name, SHORT.get(kind, kind)) for name, kind in pairs]


def structures(table: dict[str, str]) -> dict[str, type[ctypes.Structure]]:
    """Return a ctypes structure for each entry; a field may be an earlier structure."""
    made: dict[str, type[ctypes.Structure]] = {}
    for name, text in table.items():
        members = [(field, made.get(kind) or KINDS[kind]) for field, kind in fields(text)]
        made[name] = type(name, (ctypes.Structure,), {"_fields_": members})
    return made


STRUCTURES = structures(FIELDS)


def filled(name: str, *values) -> ctypes.Structure:
    """Return the structure `name` with these values of its fields, in order; each field needs one."""
    made = STRUCTURES[name]
    if len(values) != len(made._fields_):
        raise TypeError(f"structure {name} has {len(made._fields_)} fields, not {len(values)}")
    return made(*values)


def described() -> dict[str, list[str]]:
    """Return the expected text of interface.cpp: arguments of functions and fields of structures."""
    said = {f"function {name}": [SHORT[kind] for kind in kinds] for name, kinds in SIGNATURES.items()}
    for name, made in STRUCTURES.items():
        items = [f"{field} {kind} at {getattr(made, field).offset}" for field, kind in fields(FIELDS[name])]
        said[f"structure {name}"] = [*items, f"{ctypes.sizeof(made)} bytes"]
    return said


def declared(built: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the argument types of its functions set.

    The first function or structure that the library declares differently raises InputError.
    """
    describe = getattr(built, "interface", None)
    if describe is None:
        raise InputError("the compiled loops do not describe their functions: install refengine again")
    describe.argtypes, describe.restype = (), ctypes.c_char_p
    compare(describe().decode(), described())
    for name, kinds in SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes, function.restype = [KINDS[SHORT[kind]] for kind in kinds], None
    return built


def compare(text: str, ours: dict[str, list[str]]) -> None:
    """Raise InputError at the first difference between the library's description and ours."""
    theirs = {name: items for name, *items in (line.split("|") for line in text.splitlines())}
    for name in {**ours, **theirs}:
        pairs = zip_longest(ours.get(name, []), theirs.get(name, []), fillvalue="nothing")
        for i, (python, cpp) in enumerate(pairs, 1):
            if python != cpp:
                raise InputError(
                    f"the compiled loops do not fit backends/cpu/interface.py: {name}, item {i}, is "
                    f"`{cpp}` in C++ and `{python}` in Python; install refengine again"
                )
