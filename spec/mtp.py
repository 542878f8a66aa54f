"""Chapter 15. Multi-token prediction: a small head that guesses the token after the next.

For position i, with the trunk's hidden state h[i] (after its final norm) and the next token id t[i+1]:

    v = eh_proj [ enorm(embed(t[i+1])), hnorm(h[i]) ]          trap 7: the embedding comes first
    v <- v + attention(norm(v));   v <- v + experts(norm(v));   o = final_layernorm(v)

and o, through the trunk's own `lm_head`, predicts t[i+2]. The head has the layers of
`mtp_hybrid_override_pattern` ("*E") with a key/value cache of its own. To look further ahead, run it again
with h := o and the token it guessed. docs/model.md, "Multi-token prediction".
"""

from __future__ import annotations

from refengine.spec.model import Model, replayed, run_layers


def new_states(model: Model, batch: int) -> list:
    """Return what the head's layers remember before the first token."""
    return [model.backend.new_state(kind, model.cfg, batch) for kind in model.cfg.mtp_layers]


def predict(model: Model, h, next_ids, states: list, lengths=None, record=False):
    """Return o [b l d] and next states, of h [b l d] and next_ids [b l]; `model.head(o)` predicts t[i+2].

    With `record` the states stay as they were, and records take their place.
    """
    cfg, ops, layers = model.cfg, model.backend.ops, head_layers(model)
    blocks = [w for _, w in layers]
    e, _ = ops.rms_norm(model.embed(next_ids), None, blocks[0]["enorm.weight"], cfg.layer_norm_epsilon)
    g, _ = ops.rms_norm(h, None, blocks[0]["hnorm.weight"], cfg.layer_norm_epsilon)
    v = ops.linear_pair(e, g, blocks[0]["eh_proj.weight"])
    final = blocks[-1]["final_layernorm.weight"]
    return run_layers(v, layers, final, states, lengths, cfg, ops, record=record)


def commit(model: Model, states: list, records: list, counts) -> list:
    """Return the head's states after the first counts[b] positions of each row of a recorded call."""
    return replayed(head_layers(model), states, records, counts, model.cfg, model.backend)


def head_layers(model: Model) -> list:
    """Return (letter, weights) of the head's layers."""
    return [(kind, model.weights[f"mtp.layers.{i}"]) for i, kind in enumerate(model.cfg.mtp_layers)]
