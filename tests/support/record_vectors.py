"""Write tests/vectors/: answers of transformers on tiny random models, for every backend to replay.

    python -m tests.support.record_vectors            writes every file, and manifest.toml
    python -m tests.support.record_vectors --check    writes nothing; says what it would change

Needs `pip install -e '.[test]'`. A file that would change by no more than rounding is left as it is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.models.nemotron_h import modeling_nemotron_h as hf

from refengine.conformance.cases import Case
from refengine.conformance.truth import router_margin, truth
from refengine.spec.arrays import widen
from refengine.spec.tensors import table
from tests.support.witness import logits, theirs

ROOT = Path(__file__).resolve().parents[2] / "tests" / "vectors"
SMALL = Case(layers="M", seed=11, length=13, n_groups=2, heads_per_group=3, chunk_size=5)
NO_LIMIT = (0.0, math.inf)
HEADER = "# Written by tests/support/record_vectors.py. One line for each file.\n[vectors]\n"


def whole(case: Case) -> tuple[dict, dict, str]:
    """Logits at once, and one token at a time over their cache."""
    far_from_a_tie(min(truth(case, row).margin.min() for row in range(case.batch)))
    model = theirs(case.cfg, case.read)
    one_by_one = logits(model, case.ids, [slice(i, i + 1) for i in range(case.length)])
    out = {"logits": logits(model, case.ids), "one_by_one": one_by_one}
    return {"ids": case.ids}, out, type(model).__name__


def mixer(case: Case) -> tuple[dict, dict, str]:
    """One mixer on a given normalised stream; for Mamba its state too."""
    model, kind = theirs(case.cfg, case.read), case.layers[0]
    module, h = model.model.layers[0].mixer, case.normal(0, case.batch, case.length, case.hidden_size)
    given, out = tensor(h), {}
    if kind == "M":
        cache = DynamicCache(config=model.config)
        y = module(given, cache_params=cache)
        tail = cache.get_conv_state(0, state_idx=0)[..., 1 - case.conv_kernel :].transpose(1, 2)
        out = {"S": cache.get_recurrent_state(0, state_idx=0), "tail": tail}
    elif kind == "*":
        causal = torch.full((case.length, case.length), -math.inf).triu(1)
        y = module(given, attention_mask=causal[None, None])[0]
    else:
        y = module(given)
    if kind == "E":
        far_from_a_tie(margin(case, h))
    return {"h": h}, {"y": y, **out}, type(module).__name__


def scan(limit=NO_LIMIT, from_zero=False, shift=0.0) -> Callable:
    def record(case: Case):
        c, at = case.cfg, (case.batch, case.length)
        x = case.normal(0, *at, c.mamba_num_heads, c.mamba_head_dim)
        dt = np.float32(case.normal(1, *at, c.mamba_num_heads) + shift)
        B, C = (case.normal(i, *at, c.n_groups, c.ssm_state_size) for i in (2, 3))
        S = case.normal(4, case.batch, *x.shape[2:], c.ssm_state_size) * (not from_zero)
        A_log, D, bias = (case.exact(key) for key in ("A_log", "D", "dt_bias"))
        y, after = hf.mamba2_chunk_scan(
            tensor(x),
            tensor(dt),
            tensor(-np.exp(A_log)),
            tensor(B),
            tensor(C),
            c.chunk_size,
            D=tensor(D),
            dt_bias=tensor(bias),
            dt_softplus=True,
            initial_states=tensor(S),
            dt_limit=limit,
            return_final_states=True,
        )
        given = {"x": x, "dt": dt, "B": B, "C": C, "S": S, "limit": np.array([limit])}
        return given, {"y": y, "S": after}, "mamba2_chunk_scan"

    return record


def conv(case: Case):
    x = case.normal(0, case.batch, case.length, case.cfg.conv_dim)
    tail = case.normal(1, case.batch, case.conv_kernel - 1, case.cfg.conv_dim)
    window = tensor(np.concatenate([tail, x], axis=1)).transpose(1, 2)
    weight, bias = tensor(case.exact("conv1d.weight"))[:, 0], tensor(case.exact("conv1d.bias"))
    y = hf.causal_conv1d_fn(window, weight, bias, activation="silu")[..., -case.length :].transpose(1, 2)
    left = window[..., case.length :].transpose(1, 2)
    return {"x": x, "tail": tail}, {"y": y, "tail": left}, "causal_conv1d_fn"


def gated_norm(case: Case):
    y, z = (case.normal(i, case.batch, case.length, case.cfg.mamba_inner) for i in (0, 1))
    module = theirs(case.cfg, case.read).model.layers[0].mixer.norm
    return {"y": y, "z": z}, {"u": module(tensor(y), tensor(z))}, type(module).__name__


def router(case: Case):
    h = case.normal(0, case.batch, case.length, case.hidden_size)
    far_from_a_tie(margin(case, h))
    module = theirs(case.cfg, case.read).model.layers[0].mixer.gate
    _, weight, expert = module(tensor(h))
    rows = torch.zeros(len(weight), case.n_routed_experts).scatter_(1, expert, weight)
    return {"h": h}, {"weights": rows.reshape(*h.shape[:2], -1)}, type(module).__name__


def margin(case: Case, h) -> float:
    gate, bias = case.exact("gate.weight"), case.exact("gate.e_score_correction_bias")
    return router_margin(h, gate, bias, case.cfg).min()


def far_from_a_tie(margin: float) -> None:
    assert margin > 1e-4, "nearly a tie in the router: take another seed"


def tensor(a) -> torch.Tensor:
    return torch.tensor(np.asarray(a, np.float32))


MOE = replace(SMALL, layers="E")
GROUPED = {"n_group": 3, "n_routed_experts": 12}
SCAN, MIXER, ALL = ".A_log .D .dt_bias", ".mixer.", "."
RECORDINGS: dict[str, tuple[Callable, Case, str, str]] = {
    # name: how, on what, the weights it needs (by parts of their names), why it exists
    "model/latent": (
        whole, Case(layers="ME*E", seed=8, length=17, heads_per_group=1), ALL,
        "every layer kind of Super and Ultra; the prompt is no multiple of the chunk"),
    "model/plain": (
        whole, Case(layers="EM*", seed=2, length=14, moe_latent_size=None, n_groups=8, heads_per_group=1,
                    chunk_size=4, conv_kernel=3), ALL,
        "Nano: experts at full width, eight groups"),
    "model/dense": (
        whole, Case(layers="MM--*-", seed=3, length=19, n_groups=1), ALL,
        "a dense hybrid with runs of one kind, one group"),
    "model/limited": (
        whole, Case(layers="E*", seed=4, length=11, n_group=3, norm_topk_prob=False, tied=True), ALL,
        "experts chosen within groups, weights not normalised, tied embeddings"),
    "mamba2/two-groups": (mixer, SMALL, MIXER, "three heads a group: which head reads which group"),
    "mamba2/eight-groups": (
        mixer, replace(SMALL, n_groups=8, heads_per_group=1), MIXER, "groups of one head"),
    "attention/three-to-one": (
        mixer, replace(SMALL, layers="*"), MIXER, "which query head reads which key head; no positions"),
    "experts/latent": (mixer, MOE, MIXER, "who reads the latent and who the full width"),
    "experts/plain": (mixer, replace(MOE, moe_latent_size=None, seed=12), MIXER, "no latent projections"),
    "mlp/relu2": (mixer, replace(SMALL, layers="-"), MIXER, "relu squared, and no gate"),
    "ssd_scan/resumed": (
        scan(), replace(SMALL, length=23), SCAN,
        "chunks that do not divide the prompt, after a state that is not zero"),
    "ssd_scan/small-steps": (
        scan(from_zero=True, shift=-7.0), SMALL, SCAN,
        "steps far below 0.001: dt is not clamped (trap 1)"),
    "ssd_scan/limited": (scan(limit=(0.05, 0.4)), SMALL, SCAN, "a limit in the config is obeyed"),
    "causal_conv/after-a-tail": (
        conv, SMALL, "conv1d", "which tap meets which token; SiLU on all channels"),
    "gated_rms_norm/two-groups": (
        gated_norm, SMALL, "mixer.norm", "gate before norm, statistics a group (trap 2)"),
    "route/bias": (router, replace(MOE, seed=15), ".gate.", "the bias chooses and does not weigh; the scale"),
    "route/groups": (
        router, replace(MOE, seed=16, **GROUPED), ".gate.",
        "the two best of each group decide which groups stay"),
    "route/not-normalised": (
        router, replace(MOE, norm_topk_prob=False, num_experts_per_tok=1, seed=17), ".gate.",
        "weights are the scores times the scale"),
}  # fmt: skip


def recorded() -> Iterator[tuple[str, dict[str, np.ndarray], str]]:
    """Of each: its name, its arrays, its line in the manifest."""
    for name, (how, case, needs, why) in RECORDINGS.items():
        with torch.no_grad():
            given, out, what = how(case)
        arrays = {"config": np.array(json.dumps(case.cfg.to_hf()))}
        arrays |= {
            f"in.{key}": a.astype(np.float32, copy=False) if a.dtype.kind == "f" else a
            for key, a in given.items()
        }
        arrays |= {f"out.{key}": np.asarray(a) for key, a in out.items()}
        arrays |= {
            row.name: widen(case.read(row.name), np.float32)
            for row in table(case.cfg)
            if any(part in row.name for part in needs.split())
        }
        source = f"transformers {transformers.__version__} {what}"
        line = {"source": source, "seed": case.seed, "dtype": "float32", "why": why}
        fields = ", ".join(f"{key} = {json.dumps(value)}" for key, value in line.items())
        yield name, arrays, f"{json.dumps(name)} = {{ {fields} }}\n"


def same(path: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the file holds these arrays, to the rounding of another machine."""
    if not path.exists():
        return False
    with np.load(path, allow_pickle=False) as old:
        if set(old.files) != set(arrays):
            return False
        floats = {key for key, a in arrays.items() if a.dtype.kind == "f"}
        return all(np.allclose(old[key], arrays[key], rtol=1e-5, atol=1e-5) for key in floats) and all(
            np.array_equal(old[key], arrays[key]) for key in set(arrays) - floats
        )


def main(check: bool) -> int:
    changed, manifest = ([], HEADER)
    for name, arrays, line in recorded():
        path, manifest = ROOT / f"{name}.npz", manifest + line
        if not same(path, arrays):
            changed.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(path, **arrays)
    if not check:
        (ROOT / "manifest.toml").write_text(manifest)
    elif (ROOT / "manifest.toml").read_text() != manifest:
        changed.append("manifest.toml")
    print(f"{'would change' if check else 'written'}: {', '.join(changed) or 'nothing'}")
    return int(check and bool(changed))


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--check", is_flag=True, help="Write nothing; fail if something would change.")
def command(check: bool):
    sys.exit(main(check=check))


if __name__ == "__main__":
    command()
