"""Faulty parts of the spec, each a likely mistake, for the tests of tests/faults to plant.

Wrong steps of the model are data that the package contains: refengine/conformance/mistakes/__init__.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np

import refengine.spec.keys
import refengine.spec.model
from refengine.spec.model import Model
from refengine.spec.state import Cache


def hidden_before_the_final_norm(patch):
    right = refengine.spec.model.run_layers
    patch.setattr(
        refengine.spec.model, "run_layers", lambda x, layers, final, *rest: right(x, layers, None, *rest)
    )


def norm_after_every_stage(patch):
    right = Model.blocks

    def blocks(self, x, states, n=None, first=0, last=None, tap=None):
        h, states = right(self, x, states, n, first, last, tap)
        return (h if last is None else h / np.sqrt((h * h).mean(-1, keepdims=True)).astype(h.dtype)), states

    patch.setattr(Model, "blocks", blocks)


def forks_write_over_each_other(patch):
    right = Cache.append

    def append(self, k, v, n=None):
        return right(dataclasses.replace(self, written=self.length.copy()), k, v, n)

    patch.setattr(Cache, "append", append)


def all_of_a_record_is_kept(patch):
    right = refengine.spec.model.replay
    patch.setattr(
        refengine.spec.model,
        "replay",
        lambda kind, record, w, cfg, state, most, n, ops: right(kind, record, w, cfg, state, most, None, ops),
    )


def commit_forgets_the_tail(patch):
    right = refengine.spec.model.replay

    def replay(kind, record, w, cfg, state, *rest):
        after = right(kind, record, w, cfg, state, *rest)
        return dataclasses.replace(after, tail=state.tail) if kind == "M" else after

    patch.setattr(refengine.spec.model, "replay", replay)


def recorded_call_moves_the_lengths(patch):
    right = Cache.tentative

    def tentative(self):
        self.length[:] += 1
        return right(self)

    patch.setattr(Cache, "tentative", tentative)


def head_of_the_last_row(patch):
    def head(self, h, rows=None):
        return self.backend.ops.logits(h if rows is None else h[:, -1], self.weights[""]["lm_head.weight"])

    patch.setattr(Model, "head", head)


def pattern_before_list(patch):
    right = refengine.spec.keys._letters
    wrong = lambda hf, lists, pattern: hf.get(pattern) or right(hf, lists, pattern)  # noqa: E731
    patch.setattr(refengine.spec.keys, "_letters", wrong)


def one_end_token(patch):
    right = refengine.spec.keys._listed
    patch.setattr(refengine.spec.keys, "_listed", lambda value: [2] if value == [2, 11] else right(value))


def flushing_widen(a, dtype):
    wide = a.astype(dtype)
    return np.where(np.abs(wide) < 1e-37, 0, wide).astype(dtype)
