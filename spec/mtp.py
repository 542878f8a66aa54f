"""Chapter 15. Multi-token prediction: a small head that guesses the token after the next.

For position i, with the trunk's hidden state h[i] (after its final norm) and the next token id t[i+1]:

    v = eh_proj [ enorm(embed(t[i+1])), hnorm(h[i]) ]          trap 7: the embedding comes first
    v <- v + attention(norm(v));   v <- v + experts(norm(v));   o = final_layernorm(v)

and o, through the trunk's own `lm_head`, predicts t[i+2]. The head has the layers of
`mtp_hybrid_override_pattern` ("*E") with a key/value cache of its own.
docs/model.md, "Multi-token prediction".

To guess further tokens, it runs again with h := o and the guessed token (`draft`). The rows of its cache
that such a run adds are provisional: they come from the head's own output, not from the trunk. They are
dropped after the last guess. When the trunk has read the accepted tokens, their rows are computed again from
its hidden states, in the call that begins the next draft.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refengine.spec.model import Model, replayed, run_layers


def new_states(model: Model, batch: int) -> list:
    """Return the states of the head's layers before the first token."""
    states = [model.backend.new_state(kind, model.cfg, batch) for kind in model.cfg.mtp_layers]
    pairs = [(state, model.scales.get(f"mtp.layers.{i}")) for i, state in enumerate(states)]
    return [state.scaled(*scales) if scales else state for state, scales in pairs]


def predict(model: Model, h, next_ids, states: list, lengths=None, record=False):
    """Return o [b l d] and next states, of h [b l d] and next_ids [b l]; `model.head(o)` predicts t[i+2].

    With `record` the states stay as they were, and records take their place.
    """
    cfg, ops, layers = model.cfg, model.backend.ops, head_layers(model)
    v = projected(model, h, next_ids)
    final = layers[-1][1]["final_layernorm.weight"]
    if not model.head_layer_norm:
        return run_layers(v, layers, final, states, lengths, cfg, ops, record=record)
    v, states = run_layers(v, layers, None, states, lengths, cfg, ops, record=record)
    v = model.backend.fetch(v)
    v = model.backend.array((v - v.mean(axis=-1, keepdims=True, dtype=np.float64)).astype(v.dtype))
    return ops.rms_norm(v, None, final, cfg.layer_norm_epsilon)[0], states


def projected(model: Model, h, next_ids):
    """Return v, what the head's layers read: b l d."""
    w, ops, eps = head_layers(model)[0][1], model.backend.ops, model.cfg.layer_norm_epsilon
    e, _ = ops.rms_norm(model.embed(next_ids), None, w["enorm.weight"], eps)
    g, _ = ops.rms_norm(h, None, w["hnorm.weight"], eps)
    return ops.linear_pair(e, g, w["eh_proj.weight"])


def last(model: Model, h, next_ids, states: list, lengths, wanted: bool):
    """Return o [b 1 d], its logits [b v] on the host if they are wanted, and next states.

    h is [b l d], next_ids [b l]; o is taken at the last real position of each row. A backend that has a
    compiled call for this does it in one.
    """
    here, next_ids = model.backend, np.asarray(next_ids)
    b, l = next_ids.shape
    lengths = np.full(b, l) if lengths is None else lengths
    if here.predict and not model.head_layer_norm:
        real = np.arange(l) < lengths[:, None]
        v = projected(model, h[real][None], here.array(next_ids[real][None]))
        if found := here.predict(model, v[0], lengths, states, wanted):
            return found
    full = (lengths == l).all()
    o, states = predict(model, h, here.array(next_ids), states, None if full else here.array(lengths))
    o = o[np.arange(b), np.maximum(lengths, 1) - 1].reshape(b, 1, o.shape[-1])
    return o, here.fetch(model.head(o))[:, 0] if wanted else None, states


def draft(model: Model, h, next_ids, states: list, count: int, choose: Callable, lengths=None) -> list:
    """Return the head's states after h [b l d] and next_ids [b l], and guess `count` tokens after them.

    choose(logits [b v]) -> ids [b], on the host, is called for each guess. lengths [b], on the host: how many
    of the positions of each row are real.
    """
    o, logits, states = last(model, h, next_ids, states, lengths, count > 0)
    provisional = [state and state.tentative() for state in states]
    for ahead in range(1, count + 1):
        guess = np.asarray(choose(logits), np.int64)[:, None]
        if ahead < count:
            o, logits, provisional = last(model, o, guess, provisional, None, True)
    return states


def commit(model: Model, states: list, records: list, counts) -> list:
    """Return the head's states after the first counts[b] positions of each row of a recorded call."""
    return replayed(head_layers(model), states, records, counts, model.cfg, model.backend)


def head_layers(model: Model) -> list:
    """Return (letter, weights) of the head's layers."""
    return [(kind, model.weights[f"mtp.layers.{i}"]) for i, kind in enumerate(model.cfg.mtp_layers)]
