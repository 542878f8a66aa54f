"""Recipes: the format of each weight, by its role in the tensor table, or by its name.

A recipe is data: RECIPES holds those of this package, and a TOML file has the same two tables.

    [roles]                                  [names]
    routed_expert = "four_over_six"          "backbone.layers.4.mixer.*" = "plain"

Formats are nvfp4, four_over_six, w4a8, fp8, mxfp8, plain, and fp8_mse: its scale, as that of a block in
four_over_six, is 1.5 times as large where the squared error is smaller so.

A name overrides a pattern with `*`, and a pattern overrides a role. Weights without a line stay as they
are, and so does the prediction head, unless a line names it. Sources: the recipes in the wheel of
nvidia-modelopt 0.47 (Super, Ultra, Lightning), the exclusions of the released Nano.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from refengine.spec.config import Config, InputError
from refengine.spec.quant import E4M3_MAX, TOP, TOP_4_OVER_6, TOP_W4A8, Packed, fp8, mxfp8, nvfp4
from refengine.spec.tensors import Tensor
from refengine.untrusted import shown


class Format(NamedTuple):
    """Holds how a matrix is packed: a function of (rows of it, amax), the kind, the columns of a block."""

    pack: Callable[..., Packed]
    kind: str
    block: int
    top: int  # largest element in units of scale_2; 0 where there is none
    algorithm: str  # its name in modelopt's metadata, without scales of inputs
    inputs: int  # largest input in units of input_scale; 0 where inputs have none


def _mxfp8(w, amax) -> Packed:
    return mxfp8(w)


FORMATS = {
    "nvfp4": Format(nvfp4, "NVFP4", 16, TOP, "W4A16_NVFP4", TOP),
    "four_over_six": Format(
        partial(nvfp4, four_over_six=True), "NVFP4", 16, TOP_4_OVER_6, "W4A16_NVFP4", TOP
    ),
    "w4a8": Format(partial(nvfp4, block=32, top=TOP_W4A8), "NVFP4", 32, TOP_W4A8, "W4A8_NVFP4_FP8", E4M3_MAX),
    "fp8": Format(fp8, "FP8", 1, 0, "FP8", E4M3_MAX),
    "fp8_mse": Format(partial(fp8), "FP8", 1, 0, "FP8", E4M3_MAX),
    "mxfp8": Format(_mxfp8, "MXFP8", 32, 0, "MXFP8", 0),
}
LINEARS = ("mamba", "attention", "routed_expert", "shared_expert", "latent", "mlp")
WEIGHT_ONLY = ("w4a16", "lightning")  # whose inputs of NVFP4 weights stay in 16 bits
CACHED = ("super", "ultra", "lightning")  # whose keys and values are in FP8
SEARCHED = FORMATS["fp8_mse"]
ROLES = (*LINEARS, "embedding", "lm_head", "router", "mtp_proj")
RECIPES: dict[str, dict[str, str]] = {
    "nvfp4": dict.fromkeys(LINEARS, "nvfp4"),
    "w4a16": dict.fromkeys(LINEARS, "nvfp4"),
    "w4a8": dict.fromkeys(LINEARS, "w4a8"),
    "fp8": dict.fromkeys(LINEARS, "fp8"),
    "mxfp8": dict.fromkeys(LINEARS, "mxfp8"),
    "nano": dict.fromkeys(("routed_expert", "shared_expert", "mamba"), "nvfp4"),
    "super": {"routed_expert": "nvfp4", "shared_expert": "fp8", "mamba": "fp8"},
    "ultra": {"routed_expert": "four_over_six", "shared_expert": "fp8_mse", "mamba": "fp8_mse"},
    "lightning": dict.fromkeys(("routed_expert", "shared_expert", "lm_head"), "four_over_six")
    | {"mamba": "fp8_mse"},
}


@dataclass(frozen=True)
class Recipe:
    """Holds formats by role and by name. `before_attention`: whether such Mamba layers are packed too."""

    name: str
    roles: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)
    before_attention: bool = True

    @cached_property
    def patterns(self) -> dict[str, str]:
        """Return the names that are patterns, with their formats."""
        return {name: chosen for name, chosen in self.names.items() if set(name) & set("*?[")}

    @property
    def packs_cache(self) -> bool:
        """Return whether keys and values are kept in FP8; calibration writes their scales."""
        return self.name in CACHED

    def packs_inputs(self, chosen: Format) -> bool:
        """Return whether inputs of weights in a format are packed too; calibration writes their scales."""
        return bool(chosen.inputs) and not (self.name in WEIGHT_ONLY and chosen.kind == "NVFP4")

    def format_of(self, row: Tensor, cfg: Config) -> str:
        """Return the name of the format of a row of the table, or "plain"."""
        if row.name in self.names:
            return self.names[row.name]
        for pattern, chosen in self.patterns.items():
            if fnmatchcase(row.name, pattern):
                return chosen
        if row.block.startswith("mtp.") or len(row.shape) != 2:
            return "plain"
        if (
            row.role == "mamba"
            and not self.before_attention
            and cfg.layers[int(row.layer or 0) + 1 :][:1] == "*"
        ):
            return "plain"
        return self.roles.get(row.role, "plain")


def recipe_of(name: str, four_over_six: bool = False) -> Recipe:
    """Return a recipe by its name, or from a TOML file; InputError names the fault.

    four_over_six: NVFP4 with blocks of 16 becomes four over six.
    """
    if name in RECIPES:
        found = Recipe(name, RECIPES[name], {}, name != "nano")
    elif name.endswith(".toml"):
        found = _from_file(Path(name))
    else:
        raise InputError(f"there is no recipe {name!r}; there is {', '.join(RECIPES)}, or a file FILE.toml")
    if not four_over_six:
        return found
    swap = {"nvfp4": "four_over_six"}
    roles, names = ({k: swap.get(v, v) for k, v in each.items()} for each in (found.roles, found.names))
    if "four_over_six" not in (*roles.values(), *names.values()):
        raise InputError(f"the recipe {name} packs nothing in NVFP4, so four over six changes nothing")
    return Recipe(found.name, roles, names, found.before_attention)


def _from_file(path: Path) -> Recipe:
    """Return the recipe in a TOML file."""
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}") from None
    if unknown := [key for key in value if key not in ("roles", "names")]:
        raise InputError(f"{path} has {shown(unknown[0])}, which is neither [roles] nor [names]")
    tables = [value.get(key, {}) for key in ("roles", "names")]
    for each in tables:
        if not isinstance(each, dict):
            raise InputError(f"{path} has {shown(each)}, where a table of formats is expected")
        for key, chosen in each.items():
            if chosen not in (*FORMATS, "plain"):
                known = ", ".join((*FORMATS, "plain"))
                raise InputError(
                    f"{path} gives {shown(key)} the format {shown(chosen)}, which is none of {known}"
                )
    for role in tables[0]:
        if role not in ROLES:
            raise InputError(f"{path} has the role {shown(role)}, which is none of {', '.join(ROLES)}")
    return Recipe(path.name, *tables)
