"""Speculation: the prediction head drafts tokens, and the trunk checks them all in one call.

drafting     the head's state of each sequence, drafts, and calls that verify them
acceptance   the rule by which drafts are kept
pace         the number of drafts, by measured costs and acceptance
"""

from refengine.spec.config import Config, InputError

MOST_DRAFTS = 64  # of one call
MTP_NORMS = ("rms", "layer")  # of the prediction head: RMSNorm, LayerNorm


def has_layer_norm(cfg: Config, mtp_norm: str) -> bool:
    """Return whether the prediction head's final norm is a LayerNorm; raises InputError for another name."""
    if mtp_norm not in MTP_NORMS:
        raise InputError(f"mtp_norm = {mtp_norm!r} is neither {' nor '.join(map(repr, MTP_NORMS))}")
    if mtp_norm == "layer" and not cfg.mtp_layers:
        raise InputError("there is no prediction head in this checkpoint, so no norm of it to choose")
    return mtp_norm == "layer"
