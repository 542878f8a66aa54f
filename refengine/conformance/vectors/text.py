"""Vectors of what needs no backend: sampling, tokenizer and chat template; and the check of these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np

import refengine
from refengine.conformance.vectors import Output, Row, Vector, judge, worst_of
from refengine.conformance.vectors.packed import convert
from refengine.spec.chat import chat
from refengine.spec.config import InputError
from refengine.spec.sample import Sampling, draw, probabilities
from refengine.spec.tokenizer import from_json
from refengine.untrusted import read_json

TINY = Path(refengine.__file__).parent / "models" / "tiny"
BORDER = 1e-4  # a case whose filter or draw is nearer to its border than this is not shipped
SAMPLINGS: dict[str, tuple[dict, str]] = {
    "plain": ({}, "no filter: softmax"),
    "temperature": ({"temperature": 0.6}, "logits are divided, before softmax"),
    "greedy": ({"temperature": 0.0, "repetition_penalty": 1.7}, "the largest, after the penalty"),
    "top-k": ({"top_k": 5}, "the fifth and sixth are equal: the lower id counts as likelier"),
    "top-p": ({"top_p": 0.8}, "the fewest that reach it, the one that crosses it included"),
    "min-p": ({"min_p": 0.15}, "measured by the likeliest token"),
    "penalty": ({"repetition_penalty": 1.4}, "positive logits are divided, others multiplied, and once"),
    "temperature-before-top-p": ({"temperature": 2.5, "top_p": 0.7}, "top_p reads what temperature made"),
    "top-k-before-top-p": ({"top_k": 4, "top_p": 0.75}, "top_p reads what top_k left, made to sum to 1"),
    "min-p-after-top-p": ({"top_p": 0.9, "min_p": 0.08, "temperature": 1.3}, "min_p reads what top_p left"),
    "all": (
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        "all five, in order",
    ),
}
TEXTS = (
    "",
    "Once upon a time",
    " the  story\n\n  ends.",
    "camelCase HTTPServer x2 don't",
    "12345 3.14",
    "naïve café Ångström",
    "日本語とespañol",
    "👩‍🚀🚀 emoji",
    "a\tb\r\nc",
    "<|im_start|>user\nHi<|im_end|>\n",
    "</s>x</s>",
    "(word) [list] {set} /path/to",
    "     ",
    "ﬁ ﬂ",
    "e\u0301 combining",
    "=" * 20,
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TALK = [{"role": "user", "content": "Hi"}]
LONGER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3", "reasoning_content": "The tool knows."},
    {"role": "user", "content": "Thanks"},
]
CHATS: tuple[dict, ...] = (
    {"messages": TALK},
    {"messages": TALK, "enable_thinking": False},
    {"messages": TALK, "add_generation_prompt": False},
    {"messages": TALK, "tools": TOOLS},
    {"messages": LONGER, "tools": TOOLS},
    {"messages": LONGER, "tools": TOOLS, "truncate_history_thinking": False},
    {"messages": LONGER[1:3], "add_generation_prompt": False},
)


class Given(np.random.Generator):
    """A generator whose random number is given."""

    def __init__(self, u: float):
        super().__init__(np.random.PCG64(0))
        self.u = u

    def random(self, *_, **__) -> float:  # type: ignore[override]
        """Return the number."""
        return self.u


def choose(vector: Vector) -> dict[str, np.ndarray]:
    """Return the probabilities after the filters, and the ids that the given uniform numbers draw."""
    logits, seen = vector.arrays["in.logits"], vector.arrays["in.seen"].tolist()
    p = probabilities(logits, Sampling(**vector.constants), seen)
    ids = [draw(p, Given(u)) for u in vector.arrays["in.u"].tolist()]
    return {"p": p, "ids": np.array(ids)}


def samplings() -> Iterator[Vector]:
    """Yield the shipped cases of sampling: logits [v], seen ids, uniform numbers u -> p [v] and ids."""
    for number, (name, (options, why)) in enumerate(SAMPLINGS.items()):
        yield sampling(f"sample/{name}", options, why, number)


def sampling(name: str, options: dict, why: str, seed: int, size: int = 41) -> Vector:
    """Return a case of sampling; it is drawn again while a filter or a draw is near its border."""
    defaults = {f.name: f.default for f in fields(Sampling)}
    for attempt in range(1000):
        rng = np.random.default_rng([seed, attempt])
        logits = (2 * rng.standard_normal(size)).astype(np.float32)
        order = np.argsort(-logits)
        logits[order[5]] = logits[order[4]]  # equal ones, at the border of top_k = 5
        seen = np.concatenate([order[:3], order[[0, 0]], rng.integers(0, size, 5)]).astype(np.int64)
        vector = Vector(
            name=name,
            operation="sample",
            why=why,
            seed=seed,
            sources={"out": f"refengine {refengine.__version__}, the definition in float64"},
            constants=defaults | options,
            arrays={"in.logits": logits, "in.seen": seen, "in.u": rng.random(16)},
            outputs={"p": Output("out.p", size), "ids": Output("out.ids", 1, exact=True)},
        )
        right = choose(vector)
        if stable(vector, right):
            return Vector(
                **vars(vector) | {"arrays": vector.arrays | {f"out.{k}": a for k, a in right.items()}}
            )
    raise AssertionError(f"{name}: every case is near a border")


def stable(vector: Vector, right: dict) -> bool:
    """Return whether no draw and no filter would come out otherwise for slightly other numbers."""
    ends = np.cumsum(right["p"])
    if np.abs(ends[:, None] - vector.arrays["in.u"]).min() < BORDER:
        return False
    nudged = (("top_p", 1 + BORDER), ("top_p", 1 - BORDER), ("min_p", 1 + BORDER), ("min_p", 1 - BORDER))
    for option, factor in nudged:
        if vector.constants[option] in (0.0, 1.0):  # no filter
            continue
        value = min(vector.constants[option] * factor, 1.0)
        other = Vector(**vars(vector) | {"constants": vector.constants | {option: value}})
        if np.flatnonzero(choose(other)["p"]).tolist() != np.flatnonzero(right["p"]).tolist():
            return False
    return True


@cache
def tiny_tokenizer():
    """Return the tokenizer of the embedded model."""
    from refengine.text.tokenizer import Tokenizer

    return Tokenizer.load(TINY)


@cache
def tiny_template():
    """Return the chat template of the embedded model."""
    from refengine.text.chat_template import ChatTemplate

    return ChatTemplate.load(TINY)


def texts() -> list[Vector]:
    """Return the cases of the tokenizer and of the chat template, each by two implementations that agree."""
    import jinja2
    import tokenizers

    spec = from_json(read_json(TINY / "tokenizer.json"))
    encoded = [{"text": text, "ids": spec.encode(text)} for text in TEXTS]
    assert all(tiny_tokenizer().hf.encode(t["text"]).ids == t["ids"] for t in encoded)
    rendered = [given | {"text": chat(**given)} for given in CHATS]
    assert all(tiny_template().render(**given) == r["text"] for given, r in zip(CHATS, rendered, strict=True))
    mine = f"refengine {refengine.__version__}, the definition"
    return [
        Vector(
            name="tokenizer/tiny",
            operation="tokenizer",
            why="text to ids of refengine/models/tiny/tokenizer.json; the bytes of the ids are the text",
            seed=0,
            sources={"out": mine, "the same": f"tokenizers {tokenizers.__version__}"},
            texts=encoded,
        ),
        Vector(
            name="chat/tiny",
            operation="chat",
            why="messages to text by refengine/models/tiny/chat_template.jinja",
            seed=0,
            sources={"out": mine, "the same": f"jinja2 {jinja2.__version__}"},
            texts=rendered,
        ),
    ]


def answer(vector: Vector) -> list[dict]:
    """Return the texts of a case as this engine computes them, in the form of a file of outputs."""
    if vector.operation == "tokenizer":
        return [{"ids": tiny_tokenizer().encode(given["text"])} for given in vector.texts]
    given = [{key: value for key, value in t.items() if key != "text"} for t in vector.texts]
    return [{"text": tiny_template().render(**each)} for each in given]


def judge_texts(vector: Vector, answers) -> Row:
    """Return the row of a case of texts: its error is the number of wrong ones, of which none is allowed."""

    def row(error: float, note: str = "") -> Row:
        return Row(vector.operation, vector.name, error, 0.0, note)

    key = "ids" if vector.operation == "tokenizer" else "text"
    if not isinstance(answers, list) or len(answers) != len(vector.texts):
        return row(np.inf, f"not a list of {len(vector.texts)} answers")
    wrong = [
        i
        for i, (mine, right) in enumerate(zip(answers, vector.texts, strict=True))
        if not isinstance(mine, dict) or mine.get(key) != right[key]
    ]
    if not wrong:
        return row(0.0)
    return row(float(len(wrong)), f"{key} of entry {wrong[0]} is wrong, and {len(wrong) - 1} more")


def judge_text_file(vector: Vector, path: Path) -> Row:
    """Return the row of a case of texts from a file of outputs."""
    try:
        return judge_texts(vector, read_json(path))
    except InputError as error:
        return Row(vector.operation, vector.name, np.inf, 0.0, str(error))


HOST: dict[str, Callable[[Vector], dict[str, np.ndarray]]] = {
    "sample": choose,
    "pack": convert,
    "unpack": convert,
}


def check_host() -> list[Row]:
    """Return a row for each shipped case of sampling, packed weights, tokenizer and chat, computed here."""
    from refengine.conformance.vectors.files import shipped

    rows = []
    for vector in shipped():
        if vector.operation in HOST:
            rows.append(worst_of(judge(vector, HOST[vector.operation](vector), "float64")))
        elif vector.texts:
            rows.append(judge_texts(vector, answer(vector)))
    return rows


def write_answers(directory: Path, vector: Vector) -> None:
    """Write the file of outputs of a case of texts."""
    path = directory / f"{vector.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answer(vector), ensure_ascii=False) + "\n", encoding="utf-8")
