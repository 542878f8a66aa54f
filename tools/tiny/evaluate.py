"""Measure every number of the embedded model's card, from its files, through the project's own engine:

    python -m tools.tiny.evaluate --model DIR             (--card FILE also writes the figures into the card)

Questions are held out (tools/tiny/cases.py). Answers are greedy, and tools/tiny/judge.py judges them. Stories
are sampled with the defaults of `generate`.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import refengine
from refengine.runner import LocalRunner
from refengine.spec import mtp
from refengine.spec.config import InputError
from refengine.spec.sample import log_probs
from tools.tiny import cases, judge, second_reading
from tools.tiny.card import write_figures
from tools.tiny.stories import chat, check, tell, words

TRAINING_SEED, HELD_OUT_SEED = 2, cases.HELD_OUT_SEED
BEGUN = "Once upon a time"


class Figures:
    """Measures one engine; methods return dicts of named numbers. `size` scales the numbers of cases."""

    def __init__(self, engine, size=1.0):
        self.engine, self.encode, self.size = engine, engine.tokenizer.encode, size

    def many(self, count):
        """Return a number of cases, scaled by `size`."""
        return max(1, round(count * self.size))

    def complete(self, prompts, chats=None, **options):
        """Return the continuations of the prompts, without end tokens."""
        texts = ["" for _ in prompts]
        for i, event in self.engine.generate_batch(prompts, chat=chats, **options):
            texts[i] += event.text
        return texts

    def right(self, asked, max_tokens=24):
        """Return the share of text cases whose greedy continuation is right."""
        told = self.complete([case.prompt for case in asked], temperature=0, max_tokens=max_tokens)
        return judge.share(case.right(text) for case, text in zip(asked, told, strict=True))

    def stories(self, count=100):
        """Return figures of sampled stories, the stories, and their faults."""
        count = self.many(count)
        told = [BEGUN + t for t in self.complete([BEGUN] * count, max_tokens=400, seed=1)]
        reports = [check(t) for t in told]
        longest = longest_runs(told, training_stories(self.many(20_000)))
        found = {
            "stories sampled": count,
            "every sentence parses": judge.share(r.parsed for r in reports),
            "names and objects consistent": judge.share(r.consistent for r in reports),
            "... and all of one plot": judge.share(r.coherent for r in reports),
            "words of a story, mean": float(np.mean([len(t.split()) for t in told])),
            "longest run of words in 20000 training stories, median": float(np.median(longest)),
            "longest run of words in 20000 training stories, max": max(longest),
            "different plots among them": len({r.plot for r in reports if r.plot}),
        }
        return found, told, [r.why for r in reports if r.why]

    def second_reading(self, told):
        """Return the shares of stories with each fault of the second reading, for model and generator."""
        rng = random.Random(HELD_OUT_SEED)
        out = {}
        for name, texts in (("", told), (" (the generator's own stories)", [tell(rng).text for _ in told])):
            readings = [second_reading.read(text) for text in texts]
            out[f"second reading, no fault{name}"] = judge.share(not r.faults for r in readings)
            for kind in second_reading.FAULTS:
                out[f"second reading, {kind} fault{name}"] = judge.share(r.has(kind) for r in readings)
        return out

    def recall(self):
        """Return recall of 4 and 8 facts across 0 to 16 stories."""
        out = {}
        for count in (4, 8):
            for stories in (0, 1, 2, 4, 8, 16):
                asked = cases.recall(count, stories, self.many(40 if stories < 8 else 20))
                out[f"recall, {count} facts, {stories} stories between"] = self.right(asked, 8)
        return out

    def small_skills(self):
        """Return the share of right answers for each small task in plain text."""
        out = {f"copying {n} words": self.right(cases.copying(n, self.many(50)), 40) for n in (5, 10)}
        out["one-digit sums (all 100)"] = self.right(cases.sums())
        out["counting to nine"] = self.right(cases.counting(self.many(8)))
        out["questions about a story"] = self.right(cases.questions(self.many(60)))
        return out

    def chats(self):
        """Return the share of right replies for each kind of chat, with thinking on and off."""
        out = {}
        for name, kind, _ in cases.CHATS:
            asked = cases.chats(kind, self.many(50))
            for thinking in (True, False):
                told = self.replies(asked, thinking, 400 if kind == "story_about_both" else 80)
                judged = (c.right(t, thinking) for c, t in zip(asked, told, strict=True))
                out[f"chat, {name}, thinking {'on' if thinking else 'off'}"] = judge.share(judged)
        return out

    def replies(self, asked, thinking, max_tokens):
        """Return the greedy replies to chat cases; each is rendered with its own tools."""
        rendered = [
            self.engine.ids(
                case.prompt, enable_thinking=thinking, **({"tools": case.tools} if case.tools else {})
            )
            for case in asked
        ]
        return self.complete(rendered, temperature=0, max_tokens=max_tokens)

    def forward(self, ids):
        """Return logits of the trunk [t v], row i for token i+1, and of the head [t-1 v], i+2."""
        runner, trunk, head = self.engine.runner, [], []
        states = mtp.new_states(runner.model, 1)
        for start, h in runner.hidden(list(ids)):
            trunk.append(runner.head(h)[0])
            following = ids[start + 1 : start + 1 + h.shape[1]]
            if len(following):
                after = runner.model.backend.array(np.array([following]))
                o, states = mtp.predict(runner.model, h[:, : len(following)], after, states)
                head.append(runner.head(o)[0])
        return np.concatenate(trunk), np.concatenate(head)

    def losses(self, count=60):
        """Return nats per token on stories never trained on, of the trunk and of the head."""
        rng, trunk, head, n, m = random.Random(HELD_OUT_SEED), 0.0, 0.0, 0, 0
        for _ in range(self.many(count)):
            ids = [*self.encode(tell(rng).text), 2]
            a, b = self.forward(ids)
            trunk -= log_probs(a[:-1])[np.arange(len(ids) - 1), ids[1:]].sum()
            head -= log_probs(b[:-1])[np.arange(len(ids) - 2), ids[2:]].sum()
            n, m = n + len(ids) - 1, m + len(ids) - 2
        return {
            "held-out loss, nats per token": float(trunk / n),
            "held-out loss of the MTP head": float(head / m),
        }

    def drafting(self, count=30):
        """Return the acceptance rate of the MTP head's drafts, in greedy and in sampled text."""
        rng = random.Random(HELD_OUT_SEED)
        figures = {}
        for name, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
            kept = total = 0
            for i in range(self.many(count)):
                who = rng.choice(words.NAMES)
                child = "girl" if who in words.GIRLS else "boy"
                prompt = self.encode(f"Once upon a time, there was a little {child} named {who}.")
                events = self.engine.generate(
                    prompt, temperature=temperature, top_p=1.0, max_tokens=150, seed=i
                )
                ids = prompt + [e.id for e in events if hasattr(e, "id")]
                a, b = self.forward(ids)
                a, b = a[len(prompt) : len(ids) - 1], b[len(prompt) - 1 : len(ids) - 2]
                total += len(a)
                if temperature:
                    p, q = (np.exp(log_probs(x / temperature)) for x in (a, b))
                    kept += float(np.minimum(p, q).sum())
                else:
                    kept += int((a.argmax(-1) == b.argmax(-1)).sum())
            figures[f"MTP acceptance, {name}"] = kept / max(total, 1)
        return figures

    def expert_load(self, texts, what):
        """Return the tokens of the busiest expert over the mean, for every expert layer, on these texts."""
        model = refengine.load(self.engine.checkpoint.directory, backend="numpy").runner.model
        ops, seen = model.backend.ops, []

        def counted(*args):
            routing = ops.route(*args)
            seen.append(np.bincount(np.asarray(routing.expert).ravel(), minlength=model.cfg.n_routed_experts))
            return routing

        watched = replace(model, backend=replace(model.backend, ops=replace(ops, route=counted), step=None))
        figures = Figures(replace(self.engine, runner=LocalRunner(watched)))
        layers = [i for i, kind in enumerate(model.cfg.layers) if kind == "E"] + ["mtp"]
        loads = np.zeros((len(layers), model.cfg.n_routed_experts))
        for text in texts:
            seen.clear()
            figures.forward(self.encode(text)[:500])
            loads += np.array(seen).reshape(-1, *loads.shape).sum(0)
        return {
            f"expert load max/mean on {what}, layer {name}": judge.balance(row)
            for name, row in zip(layers, loads, strict=True)
        }

    def samples(self, count=10):
        """Return the first `count` stories and chats, not selected, in Markdown."""
        out = ["# Samples, none left out", "", "## Stories", ""]
        for text in self.complete([BEGUN] * self.many(count), max_tokens=400, seed=11):
            out += [BEGUN + text, "", "---", ""]
        out += ["## Chats", ""]
        rng = cases.seeded("samples")
        for i in range(self.many(count)):
            talk, thinking = chat.talk(rng), i % 2 == 0
            case = cases.Case(talk.prompt(), talk.answer, tuple(talk.calls), talk.tools)
            names = ", ".join(tool["function"]["name"] for tool in talk.tools or [])
            out += [f"Tools: {names}", ""] if names else []
            for message in talk.prompt():
                made = "".join(f"{c['function']}" for c in message.get("tool_calls", []))
                out += [f"**{message['role']}:** {message['content']}{made}", ""]
            reply = self.replies([case], thinking, 300)[0]
            out += [f"**reply, thinking {'on' if thinking else 'off'}:** {reply}", "", "---", ""]
        return "\n".join(out)


def training_stories(count):
    """Return the first stories of the training generator (any seed draws from the same distribution)."""
    rng = random.Random(TRAINING_SEED)
    return [tell(rng).text for _ in range(count)]


def longest_runs(texts, corpus):
    """Return, for each text, the length of its longest run of words that occurs in the corpus.

    Runs of one word, two words, ... are compared by hash. Every story ends with a separator that no
    text contains.
    """
    numbers = {}

    def code(text):
        return [numbers.setdefault(word, len(numbers)) for word in text.split()]

    flat = [n for i, text in enumerate(corpus) for n in (*code(text), -1 - i)]
    rows = [np.array(row, np.int64).astype(np.uint64) for row in (flat, *map(code, texts))]
    hashes, factor = [row + np.uint64(1) for row in rows], np.uint64(0x9E3779B97F4A7C15)
    best = [0] * len(texts)
    for length in range(1, max(len(row) for row in rows[1:]) + 1):
        known = np.unique(hashes[0])
        hit = [bool((known[np.searchsorted(known[:-1], h)] == h).any()) for h in hashes[1:]]
        best = [length if h else b for b, h in zip(best, hit, strict=True)]
        if not any(hit):
            break
        hashes = [h[:-1] * factor + row[length:] for h, row in zip(hashes, rows, strict=True)]
    return best


def load(model):
    """Return an engine, on the cpu backend if there is a compiler, else on NumPy (ten times slower)."""
    try:
        return refengine.load(model, backend="cpu", batch=32)
    except InputError:
        return refengine.load(model, backend="numpy", batch=32)


def measure(model, say, size=1.0):
    """Call `say` with every figure, in the order of the card; return (Figures, faults of the stories)."""
    figures = Figures(load(model), size)
    say(figures.losses())
    found, told, wrong = figures.stories()
    say(found)
    say(figures.second_reading(told))
    say(figures.recall())
    say(figures.small_skills())
    say(figures.chats())
    say(figures.drafting())
    rng = cases.seeded("load")
    say(figures.expert_load(told[: figures.many(40)], "stories"))
    say(figures.expert_load([cases.text_of(chat.chat(rng)) for _ in range(figures.many(40))], "chats"))
    return figures, wrong


def shown(value):
    """Return a figure as text, as the card shows it."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def row_of(name, value):
    """Return (figure, measured, bar) as texts; a bar that is missed is marked."""
    bar = cases.bar_of(name)
    text = f"{bar[0]} {bar[1]:g}" if bar else ""
    return name, shown(value), text if cases.met(name, value) is not False else f"{text} MISSED"


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--card", help="also write the figures into this model card, between its markers")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--samples", help="also write ten stories and ten chats to this file")
    parser.add_argument("--size", type=float, default=1.0, help="scales the numbers of cases (for tests)")
    args = parser.parse_args()
    begun, out = time.perf_counter(), {}

    def say(found):
        out.update(found)
        for name, value in found.items():
            print("{:76s} {:>9s}  {}".format(*row_of(name, value)), flush=True)

    figures, wrong = measure(args.model, say, args.size)
    missed = [name for name, value in out.items() if cases.met(name, value) is False]
    say({"bars missed": len(missed), "seconds this took": round(time.perf_counter() - begun)})
    for why in wrong[:10]:
        print("failed:", why)
    if args.card:
        write_figures(Path(args.card), [row_of(name, value) for name, value in out.items()])
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    if args.samples:
        Path(args.samples).write_text(figures.samples() + "\n")


if __name__ == "__main__":
    main()
