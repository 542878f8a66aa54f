"""Every number of the embedded model's card, from the shipped files, through the project's own engine:

    python -m tools.tiny.evaluate                 (--card FILE also writes them into the card)

Greedy answers are compared word for word; stories are sampled as `generate` samples them by default.
"""

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import refengine
from refengine.spec import mtp
from refengine.spec.sample import log_probs
from tools.tiny.stories import chat, check, skills, tell, words

TRAINING_SEED, HELD_OUT_SEED = 2, 90_001
MARKS = "<!-- figures -->", "<!-- end of figures -->"


def text_of(pieces):
    return "".join(t for t, _ in pieces)


class Figures:
    """Measures one engine; every method returns a dict of named numbers."""

    def __init__(self, engine):
        self.engine, self.encode = engine, engine.tokenizer.encode

    def complete(self, prompts, chats=None, **options):
        """The texts that follow the prompts, without end tokens."""
        texts = ["" for _ in prompts]
        for i, event in self.engine.generate_batch(prompts, chat=chats, **options):
            texts[i] += event.text
        return texts

    def right(self, cases, max_tokens=24, chats=None):
        """The share of (prompt, expected) whose greedy continuation is what was expected."""
        prompts, expected = zip(*cases, strict=True)
        told = self.complete(prompts, chats, temperature=0, max_tokens=max_tokens)
        return sum(t.split("\n")[0].strip() == e for t, e in zip(told, expected, strict=True)) / len(cases)

    def stories(self, count=100):
        """Sampled stories, read back by the generator's parser, and how far they repeat training text."""
        begun = "Once upon a time"
        told = [begun + t for t in self.complete([begun] * count, max_tokens=400, seed=1)]
        reports = [check(t) for t in told]
        longest = longest_runs(told, training_stories(20_000))
        found = {
            "stories sampled": count,
            "every sentence parses": sum(r.parsed for r in reports) / count,
            "names and objects consistent": sum(r.consistent for r in reports) / count,
            "... and all of one plot": sum(r.coherent for r in reports) / count,
            "words of a story, mean": float(np.mean([len(t.split()) for t in told])),
            "longest run of words in 20000 training stories, median": float(np.median(longest)),
            "longest run of words in 20000 training stories, max": max(longest),
            "different plots among them": len({r.plot for r in reports if r.plot}),
        }
        return found, told, [r.why for r in reports if r.why]

    def recall(self, count, stories, cases=40):
        """Name to thing: one question after `count` facts and `stories` stories."""
        rng, out = random.Random(HELD_OUT_SEED + 100 * count + stories), []
        for _ in range(cases):
            pairs = skills.facts(rng, count)
            name, thing = rng.choice(pairs)
            prompt = text_of(skills.state(pairs) + skills.between(rng, stories, pairs))
            out.append((f"{prompt}\nQuestion: What does {name} have?\nAnswer:", f"{name} has the {thing}."))
        share = self.right(out, 8)
        return share, int(np.mean([len(self.encode(p)) for p, _ in out]))

    def small_skills(self, cases=50):
        rng = random.Random(HELD_OUT_SEED)
        figures = {}
        for size in (5, 10):
            some = [" ".join(rng.sample(skills.COPY_WORDS, size)) for _ in range(cases)]
            figures[f"copying {size} words"] = self.right([(f"Copy: {s}\nAnswer:", s) for s in some])
        both = [(a, b) for a in range(10) for b in range(10)]
        figures["one-digit sums (all 100)"] = self.right(
            [(f"Question: What is {a} + {b}?\nAnswer:", f"{a} + {b} = {a + b}.") for a, b in both]
        )
        counts = [(rng.choice(words.THINGS), n) for n in range(1, 10) for _ in range(5)]
        figures["counting to nine"] = self.right(
            [(f"Count:{f' {w}' * n}\nAnswer:", f"{words.NUMBERS[n]}.") for w, n in counts]
        )
        asked = []
        for _ in range(cases):
            story = tell(rng)
            question, answer = rng.choice(story.questions)
            asked.append((f"{story.text}\n\nQuestion: {question}\nAnswer:", answer))
        figures["questions about a story"] = self.right(asked)
        return figures

    def chats(self, cases=50):
        rng, figures = random.Random(HELD_OUT_SEED), {}
        for thinking in (True, False):
            found = {"sum": [], "recall": [], "question": []}
            while any(len(v) < cases for v in found.values()):
                user, _, answer = chat.turn(rng)
                user, answer = text_of(user), text_of(answer)
                kind = (
                    "sum"
                    if "+" in user and len(user) < 20
                    else "recall"
                    if user.startswith("Remember")
                    else "question"
                    if "\n\n" in user
                    else None
                )
                if kind and len(found[kind]) < cases:
                    found[kind].append(([{"role": "user", "content": user}], answer))
            for kind, items in found.items():
                told = self.complete(
                    [m for m, _ in items], {"enable_thinking": thinking}, temperature=0, max_tokens=64
                )
                ends = [t.split("</think>")[-1].strip() for t in told]
                share = sum(e == a for e, (_, a) in zip(ends, items, strict=True)) / cases
                figures[f"chat, {kind}, thinking {'on' if thinking else 'off'}"] = share
        return figures

    def forward(self, ids):
        """Teacher-forced logits of the trunk [t v], row i about token i+1, and of the head [t-1 v], i+2."""
        model, trunk, head = self.engine.model, [], []
        states = mtp.new_states(model, 1)
        for start, _, h, _ in self.engine.read([list(ids)]):
            trunk.append(model.backend.fetch(model.head(h))[0])
            following = ids[start + 1 : start + 1 + h.shape[1]]
            if len(following):
                o, states = mtp.predict(model, h[:, : len(following)], np.array([following]), states)
                head.append(model.backend.fetch(model.head(o))[0])
        return np.concatenate(trunk), np.concatenate(head)

    def losses(self, count=60):
        """Nats per token on stories never trained on, of the trunk and of the head."""
        rng, trunk, head, n, m = random.Random(HELD_OUT_SEED), 0.0, 0.0, 0, 0
        for _ in range(count):
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
        """How often the head's guess is accepted, in the model's greedy and in its sampled text."""
        rng = random.Random(HELD_OUT_SEED)
        figures = {}
        for name, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7)):
            kept = total = 0
            for i in range(count):
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
            figures[f"MTP acceptance, {name}"] = kept / total
        return figures

    def expert_load(self, texts):
        """Tokens of the busiest expert over the mean, in every expert layer, on the model's own stories."""
        model = self.engine.model
        ops, seen = model.backend.ops, []

        def counted(*args):
            routing = ops.route(*args)
            seen.append(np.bincount(np.asarray(routing.expert).ravel(), minlength=model.cfg.n_routed_experts))
            return routing

        watched = replace(model, backend=replace(model.backend, ops=replace(ops, route=counted)))
        figures = Figures(replace(self.engine, model=watched))
        layers = [i for i, kind in enumerate(model.cfg.layers) if kind == "E"] + ["mtp"]
        loads = np.zeros((len(layers), model.cfg.n_routed_experts))
        for text in texts:
            seen.clear()
            figures.forward(self.encode(text)[:500])
            loads += np.array(seen)
        return {
            f"expert load max/mean, layer {name}": float(row.max() / row.mean())
            for name, row in zip(layers, loads, strict=True)
        }


def training_stories(count):
    """The first stories of the training stream's generator (any seed draws from the same world)."""
    rng = random.Random(TRAINING_SEED)
    return [tell(rng).text for _ in range(count)]


def longest_runs(texts, corpus):
    """For each text, the length of its longest run of words that occurs in the corpus.

    Runs of one word, two words, ... are compared by hash; a separator no text contains ends every story.
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


def measure(model, say):
    """Tell all figures to `say`, in the order of the card; return the sampled stories and their faults."""
    figures = Figures(refengine.load(model))
    say(figures.losses())
    found, told, wrong = figures.stories()
    say(found)
    for count in (4, 8):
        for stories in (0, 1):
            share, _ = figures.recall(count, stories)
            say({f"recall, {count} facts, {stories} stories between": share})
    for stories in (2, 4, 8, 16, 32):
        share, length = figures.recall(4, stories, cases=16)
        say({f"recall, 4 facts, {stories} stories between (about {length} tokens)": share})
    say(figures.small_skills())
    say(figures.chats())
    say(figures.drafting())
    say(figures.expert_load(told[:40]))
    return told, wrong


def write_card(path, figures):
    """Put the figures between the markers of the card."""
    before, rest = Path(path).read_text().split(MARKS[0])
    rows = [
        "| figure | measured |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in figures.items()),
    ]
    Path(path).write_text(
        before + MARKS[0] + "\n" + "\n".join(rows) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--card", help="also write the figures into this model card, between its markers")
    parser.add_argument("--stories", help="also write the sampled stories to this file")
    args = parser.parse_args()
    begun, out = time.perf_counter(), {}

    def say(found):
        for name, value in found.items():
            out[name] = f"{value:.3f}" if isinstance(value, float) else str(value)
            print(f"{name:76s} {out[name]}", flush=True)

    told, wrong = measure(args.model, say)
    say({"seconds this took": round(time.perf_counter() - begun)})
    for why in wrong[:10]:
        print("failed:", why)
    if args.card:
        write_card(args.card, out)
    if args.stories:
        Path(args.stories).write_text("\n\n----\n\n".join(told))


if __name__ == "__main__":
    main()
