"""The fingerprint of a model: it identifies its weights in any file layout, for saved states and traces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from refengine.spec.config import Config
from refengine.spec.tensors import table

PART = 4096  # bytes from the start, the middle and the end of each tensor


def fingerprint(cfg: Config, read: Callable[[str], Any]) -> str:
    """Return 16 hexadecimal digits of the config, the tensor table and 4 KB of three places of each tensor.

    read: a tensor by its name in the table, in the form of the file. The prediction head is left out, since
    engines that do not run it do not load it.
    """
    rows = [row for row in table(cfg) if not row.block.startswith("mtp.")]
    known = {key: value for key, value in cfg.to_hf().items() if "mtp" not in key and "nextn" not in key}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for row in rows:
        digest.update(f"{row.name} {list(row.shape)}".encode())
        value = read(row.name)
        if not isinstance(value, np.ndarray):  # packed: values of three of its rows
            middle, last = row.shape[0] // 2, row.shape[0] - 1
            value = np.stack([value[i : i + 1].dequantize(np.float32) for i in (0, middle, last)])
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        middle = len(raw) // 2 // PART * PART
        for start in (0, middle, max(0, len(raw) - PART)):
            digest.update(raw[start : start + PART].tobytes())
    return digest.hexdigest()[:16]
