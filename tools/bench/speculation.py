"""Measure speculation: what its parts cost, how many drafts are accepted, and what that gives.

    python -m tools.bench.speculation parts [MODEL]        a step, a call that verifies, a draft, a replay
    python -m tools.bench.speculation acceptance           by position: stories, chat, skills (embedded model)
    python -m tools.bench.speculation bars [MODEL]         speed-up, beside what the parts allow; auto
    python -m tools.bench.speculation experts              met by several positions, over an even choice
    python -m tools.bench.speculation predict              Nano, Super, Ultra on H100 and B200, by bytes read

A model without a head gets a random one. With --rate R the head runs in full and its drafts are replaced:
each is the text's next token with probability R.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import numpy as np

import refengine
from refengine.checkpoint.random_values import random_values
from refengine.generation import End
from refengine.loop import Loop
from refengine.runner import How, LocalRunner, Part
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config
from refengine.spec.ops import placed_by
from refengine.spec.sample import Sampling
from refengine.spec.tensors import placed, table
from refengine.speculation.acceptance import Guess, guess
from refengine.speculation.pace import Pace

GREEDY = Sampling(temperature=0)
CLOCK = time.process_time  # with one thread; on a busy machine wall time says nothing
WIDTHS = range(1, 10)
DRAFTS = range(1, 9)


def with_head(runner: LocalRunner) -> LocalRunner:
    """Return a runner of the same model with a random prediction head."""
    model = runner.model
    cfg = replace(model.cfg, mtp_layers="*E")
    values, rows = random_values(cfg), [row for row in table(cfg) if row.block.startswith("mtp.")]
    head = placed(
        rows,
        lambda group: placed_by(
            model.backend, group, [values(row).astype(DTYPES[row.dtype]) for row in group.rows]
        ),
    )
    return LocalRunner(replace(model, cfg=cfg, weights=model.weights | head))


def replaced(texts: dict[tuple[int, ...], list[int]], rate: float):
    """Return a patch by which a draft is its text's next token with probability `rate`; the head runs."""
    rng = np.random.default_rng(0)

    def chosen(logits, sampling, seen, generator) -> Guess:
        made = guess(logits, sampling, seen, generator)
        prompt = next((prompt for prompt in texts if tuple(seen[: len(prompt)]) == prompt), ())
        rest = texts.get(prompt, [])[len(seen) - len(prompt) :]
        token = rest[0] if rest and rng.random() < rate else (made.token + 1) % len(logits)
        return made._replace(token=token)

    return mock.patch("refengine.speculation.drafting.guess", chosen)


def timed(work: Callable, repeat: int) -> float:
    """Return the least seconds of `repeat` runs: others are held up where the machine is busy."""
    times = []
    for _ in range(repeat):
        began = CLOCK()
        work()
        times.append(CLOCK() - began)
    return min(times)


def read(runner: LocalRunner, slot: int, ids: list[int]) -> int:
    """Read a prompt whose text is to be drafted, and return the first token."""
    [draw] = runner.read([Part(slot, ids, How(GREEDY, drafts=True), True)])
    return draw.id


def parts(runner: LocalRunner, prompt: list[int], repeat: int) -> dict:
    """Return seconds: step[b] of b sequences; verify[w], replay[w] of w positions; first[r], further draft.

    first[r]: the first draft of a call, for which the head reads r rows.
    """
    cfg, rng = runner.config, np.random.default_rng(0)
    found: dict = {"step": {}, "verify": {}, "replay": {}, "first": {}}
    for size in DRAFTS:
        slots, ids = list(range(size)), rng.integers(0, cfg.vocab_size, size).tolist()
        runner.fill(slots, len(prompt))
        step = partial(runner.step, slots, ids, draw=False)
        found["step"][size] = timed(step, repeat)
        runner.drop(slots)
    read(runner, 0, prompt)
    for width in WIDTHS:
        ids = rng.integers(0, cfg.vocab_size, width).tolist()
        found["verify"][width] = timed(lambda ids=ids: runner.verify([0], [ids]), repeat)
        times = []
        for _ in range(repeat):
            runner.verify([0], [ids])
            began = CLOCK()
            runner.commit([0], [width])
            times.append(CLOCK() - began)
        found["replay"][width] = min(times)
    runner.drop([0])
    drafter = runner.drafter

    def drafting(rows: int, count: int) -> float:
        times = []
        for _ in range(repeat):
            waits = drafter.waiting[0]
            waits.count, waits.tokens = rows, [5] * rows
            waits.hidden = np.ones((rows, cfg.hidden_size), drafter.dtype)
            runner.seat([0], [])
            began = CLOCK()
            drafter.guess([0], [0], [count])
            times.append(CLOCK() - began)
        return min(times)

    read(runner, 0, prompt)
    for rows in DRAFTS:
        found["first"][rows] = drafting(rows, 1)
    found["further"] = (drafting(1, 5) - drafting(1, 1)) / 4
    runner.drop([0])
    return found


def allowed(costs: dict, drafts: int, tokens: float) -> float:
    """Return the speed-up that the costs of a step, drafts, a verified call and its replay allow."""
    rows = min(8, max(1, round(tokens)))
    call = costs["first"][rows] + (drafts - 1) * costs["further"] + costs["verify"][drafts + 1]
    return tokens * costs["step"][1] / (call + costs["replay"][max(1, round(tokens))])


def written(engine, prompts: list, drafts: int | str | None, tokens: int) -> tuple[float, float, list, list]:
    """Return seconds of the model's calls, wall seconds, texts and statistics, one prompt after the other."""
    engine.__dict__.pop("loop", None)
    loop: Loop = engine.loop
    loop.pace = Pace(CLOCK)
    loop_step, spent = engine.runner.step, [0.0]

    def step(slots, ids, draw=True):
        began = CLOCK()
        result = loop_step(slots, ids, draw)
        spent[0] += CLOCK() - began
        return result

    engine.runner.step = step
    texts, statistics, wall = [], [], 0.0
    for prompt in prompts:
        *events, end = engine.generate(
            prompt, max_tokens=tokens, temperature=0, ignore_eos=True, speculate=drafts
        )
        assert isinstance(end, End)
        wall += end.statistics["decode_seconds"]
        texts.append([event.id for event in events])
        statistics.append(end.statistics)
    del engine.runner.step
    seconds = loop.pace.total if drafts else spent[0]
    return seconds, wall, texts, statistics


def positions(statistics: list[dict]) -> tuple[float, list[float]]:
    """Return tokens a call with drafts, and the share of drafts that were accepted, by position."""
    found = [s["speculation"] for s in statistics]
    calls, tokens = sum(f["calls"] for f in found), sum(f["tokens"] for f in found)
    most = max((len(f["drafted_by_position"]) for f in found), default=0)
    shares = []
    for i in range(most):
        made, right = (
            sum(f[key][i] for f in found if i < len(f[key]))
            for key in ("drafted_by_position", "accepted_by_position")
        )
        shares.append(right / made)
    return (tokens / calls if calls else 1.0), shares


def kinds(count: int) -> Iterator[tuple[str, list]]:
    """Yield the kinds of prompts of the embedded model, with prompts that it was not trained on."""
    from tools.tiny import cases
    from tools.tiny.stories import tell

    rng = cases.seeded("speculation")
    yield "stories", [" ".join(tell(rng).text.split()[:12]) for _ in range(count)]
    scenes = [kind for _, kind, _ in cases.CHATS]
    yield "chat", [cases.chats(scenes[i % len(scenes)], 1 + i)[-1].prompt for i in range(count)]
    skills = [cases.copying(6, count), cases.sums(), cases.counting(2), cases.questions(count)]
    yield "skills", [skills[i % 4][i % len(skills[i % 4])].prompt for i in range(count)]


def show_parts(costs: dict) -> None:
    """Print the costs by part in milliseconds."""
    print("| n | step of n sequences | verify n positions | replay n | first draft after n rows |")
    print("|---|---|---|---|---|")
    for n in DRAFTS:
        row = (costs[part][n] * 1e3 for part in ("step", "verify", "replay", "first"))
        print(f"| {n} | " + " | ".join(f"{ms:.3f}" for ms in row) + " |")
    share = max(costs["replay"][n] / costs["verify"][n] for n in DRAFTS)
    print(f"\na further draft {costs['further'] * 1e3:.3f} ms; replay at most {share:.1%} of its verify step")


def prompts_of(engine) -> list:
    """Return prompts: stories, or random ids of a model without a tokenizer."""
    if engine.config.vocab_size == 2048:  # the embedded model
        return next(kinds(4))[1]
    rng = np.random.default_rng(1)
    return [rng.integers(0, engine.config.vocab_size, 12).tolist() for _ in range(2)]


def bars(engine, arguments) -> None:
    """Print speed-ups, beside those that the parts allow, and of auto."""
    costs = parts(engine.runner, [1] * 12, arguments.repeat)
    show_parts(costs)
    prompts = prompts_of(engine)
    plain, wall, texts, _ = written(engine, prompts, None, arguments.tokens)
    known = {tuple(engine.ids(p)): text for p, text in zip(prompts, texts, strict=True)}
    with_drafts = nullcontext() if arguments.rate is None else replaced(known, arguments.rate)
    print("\n| drafts | tokens a call | accepted by position | speed-up | allowed | of it | wall |")
    print("|---|---|---|---|---|---|---|")
    with with_drafts:
        for drafts in [*arguments.drafts, "auto"]:
            before, again, _, _ = written(engine, prompts, None, arguments.tokens)
            took, around, same, statistics = written(engine, prompts, drafts, arguments.tokens)
            differ = sum(one != other for one, other in zip(same, texts, strict=True))
            tokens, shares = positions(statistics)
            most = allowed(costs, drafts, tokens) if isinstance(drafts, int) else float("nan")
            up = min(plain, before) / took
            listed = " ".join(f"{share:.0%}" for share in shares)
            print(
                f"| {drafts} | {tokens:.2f} | {listed} | {up:.2f} | {most:.2f} | {up / most:.2f} | "
                f"{min(wall, again) / around:.2f} |" + (f" {differ} texts differ" if differ else ""),
                flush=True,
            )
    seconds = engine.runner.drafter.seconds
    total = sum(seconds.values())
    print("\nall calls: " + ", ".join(f"{part} {share / total:.0%}" for part, share in seconds.items()))


def acceptance(engine, arguments) -> None:
    """Print how many drafts are accepted, by position and kind of text."""
    print("| text | sampled at | tokens a call | accepted by position |\n|---|---|---|---|")
    most = max(arguments.drafts)
    for kind, prompts in kinds(arguments.count):
        for temperature in (0, 1.0):
            statistics = []
            asked = {"max_tokens": arguments.tokens, "temperature": temperature, "seed": 1}
            for _, event in engine.generate_batch(prompts, speculate=most, **asked):
                if isinstance(event, End):
                    statistics.append(event.statistics)
            tokens, shares = positions(statistics)
            listed = " ".join(f"{share:.0%}" for share in shares)
            print(f"| {kind} | {temperature:g} | {tokens:.2f} | {listed} |", flush=True)


def experts(engine, arguments) -> None:
    """Print the share of experts that a call of several positions meets, beside that of an even choice."""
    cfg, ops, found = engine.config, engine.model.backend.ops, []

    def route(*args):
        routing = ops.route(*args)
        found.append(np.asarray(engine.model.backend.fetch(routing.expert))[0])
        return routing

    watched = replace(engine.model.backend, ops=replace(ops, route=route), step=None)
    runner = LocalRunner(replace(engine.model, backend=watched))
    for kind, prompts in kinds(arguments.count):
        for prompt in prompts:
            runner.logits(engine.ids(prompt))
        shares = []
        for width in WIDTHS:
            met = [
                len(np.unique(layer[at : at + width])) / cfg.n_routed_experts
                for layer in found
                for at in range(0, len(layer) - width, width)
            ]
            even = 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** width
            shares.append(f"{np.mean(met) / even:.2f}")
        found.clear()
        print(f"| {kind} | " + " | ".join(shares) + " |")


# What the report gives for NVFP4: 4-bit experts with a scale a block of 16, FP8 for Mamba and the shared
# expert; the head is BF16. Bytes of a weight by role.
RECIPES = {"BF16": {}, "NVFP4": {"routed_expert": 0.5625, "mamba": 1.0, "shared_expert": 1.0}}
MACHINES = {"H100": (3.35e12, 80e9), "B200": (7.7e12, 180e9)}  # bytes a second, and bytes, as vendors say
# Tokens a call that were published, and at how many drafts. Nano has no head; Lightning is the same trunk
# with one, and nothing was published of it: as for Super.
PUBLISHED = {"lightning": (3.45, 7), "super": (3.45, 7), "ultra": (4.387, 7)}


@cache
def sizes(name: str) -> dict[tuple[str, str], int]:
    """Return the weights of a released model by (trunk, head or outside; role)."""
    from tools.releases import CONFIGS

    found: Counter[tuple[str, str]] = Counter()
    for row in table(CONFIGS[name]):
        found[row.block.split(".")[0], row.role] += row.size
    return dict(found)


def bytes_read(name: str, cfg: Config, recipe: dict, tokens: float, block: str, context: int) -> float:
    """Return the bytes that a call of so many tokens reads of "layers" or "mtp", experts by the tokens."""
    total = 0.0
    for (where, role), size in sizes(name).items():
        if where != block:
            continue
        share = 1.0
        if role == "routed_expert":
            share -= (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** tokens
        total += share * size * (2.0 if block == "mtp" else recipe.get(role, 2.0))
    letters = cfg.layers if block == "layers" else cfg.mtp_layers
    return total + 2 * 2 * cfg.num_key_value_heads * cfg.head_dim * context * letters.count("*")


def tokens_of(rate: float, drafts: int) -> float:
    """Return the tokens of a call, if each draft is accepted with the same probability."""
    return sum(rate**i for i in range(drafts + 1))


def rate_of(tokens: float, drafts: int) -> float:
    """Return the probability with which a draft is accepted, by the tokens of a call."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_of(middle, drafts) < tokens else (low, middle)
    return low


def predicted(name: str, recipe: dict, machine: str, drafts: int, rate: float, layer: float, context: int):
    """Return tokens a second of plain steps, the speed-up with drafts, and the devices it is for.

    layer: seconds a layer takes beside its bytes, in launches and messages; it is the same for any few rows.
    """
    from tools.releases import CONFIGS

    cfg = CONFIGS[name]
    bandwidth, memory = MACHINES[machine]
    whole = sum(size * recipe.get(role, 2.0) for (_, role), size in sizes(name).items())
    devices = 2 ** max(0, math.ceil(math.log2(whole / (0.9 * memory))))
    head = 2.0 * cfg.vocab_size * cfg.hidden_size
    S = 4.0 * cfg.mamba_num_heads * cfg.mamba_head_dim * cfg.ssm_state_size * cfg.layers.count("M")
    rest, drafting = layer * len(cfg.layers), layer * len(cfg.mtp_layers)

    def seconds(size: float) -> float:
        return size / (bandwidth * devices)

    def read(tokens: float, block: str) -> float:
        return bytes_read(name, cfg, recipe, tokens, block, context) + head

    tokens = tokens_of(rate, drafts)
    plain = seconds(read(1, "layers") + 2 * S) + rest
    made = seconds(read(tokens, "mtp")) + (drafts - 1) * seconds(read(1, "mtp")) + drafts * drafting
    checked = seconds(read(drafts + 1, "layers") + 3 * S) + rest  # S is read once, then by the replay
    return 1 / plain, tokens * plain / (made + checked), devices


def predict(context: int, layers: list[float]) -> None:
    """Print what bytes, and launches, allow for released models at the published acceptance."""
    columns = "model, weights", "machine", "us a layer", "plain tokens/s", "1, 2, 3, 4, 6, 8 drafts", "best"
    print(f"| {' | '.join(columns)} |\n|---|---|---|---|---|---|")
    for name, (accepted, at) in PUBLISHED.items():
        rate = rate_of(accepted, at)
        for weights, recipe in RECIPES.items():
            for machine in MACHINES:
                for layer in layers:
                    how = rate, layer * 1e-6, context
                    ups = {k: predicted(name, recipe, machine, k, *how) for k in DRAFTS}
                    plain, _, devices = ups[1]
                    best = max(ups, key=lambda k: ups[k][1])
                    listed = " ".join(f"{ups[k][1]:.2f}" for k in (1, 2, 3, 4, 6, 8))
                    print(
                        f"| {name}, {weights} | {devices} x {machine} | {layer:g} | {plain:.0f} | {listed} | "
                        f"{best} |"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("parts", "acceptance", "bars", "experts", "predict"))
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="1: times are those of the processor")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--count", type=int, default=40, help="texts of a kind")
    parser.add_argument("--repeat", type=int, default=16)
    parser.add_argument("--drafts", type=lambda text: [int(k) for k in text.split(",")], default=[1, 2, 3, 5])
    parser.add_argument(
        "--layer", type=float, default=20.0, help="microseconds a layer takes beside its bytes"
    )
    parser.add_argument("--context", type=int, default=10_000)
    arguments = parser.parse_args()
    if arguments.what == "predict":
        return predict(arguments.context, [0.0, arguments.layer])
    global CLOCK
    CLOCK = time.process_time if arguments.threads == 1 else time.perf_counter
    how = {"backend": arguments.backend, "dtype": arguments.dtype, "threads": arguments.threads}
    engine = refengine.load(arguments.model, **how)
    if not engine.config.mtp_layers:
        engine.runner = with_head(engine.runner)
    engine.runner.drafter.clock = CLOCK
    if arguments.what == "acceptance":
        return acceptance(engine, arguments)
    if arguments.what == "experts":
        return experts(engine, arguments)
    if arguments.what == "bars":
        return bars(engine, arguments)
    return show_parts(parts(engine.runner, [1] * 12, arguments.repeat))


if __name__ == "__main__":
    main()
