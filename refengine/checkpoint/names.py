"""Names of tensors: exporters spell them in several ways; each gets the name that the tensor table has.

    language_model.backbone.embedding.weight  ->  backbone.embeddings.weight

Sources: docs/model.md, "Parameters"; the table for readers is in docs/names.md.
"""

from __future__ import annotations

import re

# PREFIXES. Any sequence of these may precede a name: the trunk, the wrapper of a model with images or sound,
# and what training programs add.
PREFIXES = ("backbone", "model", "language_model", "base_model", "module", "_orig_mod")
PREFIX = re.compile(rf"^(?:(?:{'|'.join(PREFIXES)})\.)+")
# ENDINGS that exporters spell in another way.
ENDINGS = {
    "embedding.weight": "embeddings.weight",
    "embed_tokens.weight": "embeddings.weight",
    "experts.up_proj.weight": "experts.up_proj",
    "experts.down_proj.weight": "experts.down_proj",
    "switch_mlp.fc1.weight": "experts.up_proj",
    "switch_mlp.fc2.weight": "experts.down_proj",
}
ENDINGS |= {
    f"{end}_scale{more}": f"embeddings.weight_scale{more}"
    for end in tuple(ENDINGS)[:2]
    for more in ("", "_2")
}
SPELLED = tuple(ENDINGS)
TRUNK = ("layers.", "embeddings.weight", "norm_f.weight")
OUTSIDE = ("lm_head.", "mtp.")
OURS = (*(f"backbone.{name}" for name in TRUNK), *OUTSIDE)


def canonical(name: str) -> str | None:
    """Return the table's name of a tensor that a file calls `name`; None if it is no part of a text model."""
    known = is_ours(name)
    if not known:
        name = PREFIX.sub("", name)
    if name.endswith(SPELLED):
        for ending, ours in ENDINGS.items():
            if name == ending or name.endswith("." + ending):
                name = name.removesuffix(ending) + ours
    if not known and name.startswith(TRUNK):
        return "backbone." + name
    return name if known or name.startswith(OUTSIDE) else None


def is_ours(name: str) -> bool:
    """Return whether a name of `canonical` is that of a tensor of the text model."""
    return name.startswith(OURS)
