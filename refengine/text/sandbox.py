"""Jinja's sandbox, with a budget: a template is a program from the checkpoint, perhaps a hostile one.

Jinja's sandbox gives no access to Python. Here time and memory are limited too: every result is charged to a
budget (`spend`), and an operation whose result may be far larger than its arguments (`text * number`,
`replace`, a column of a billion characters) is checked before it runs (`fits`).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from datetime import datetime

import jinja2
from jinja2 import ext, nodes
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET = 2**25  # characters that a template may make of nothing,
PER_CHARACTER = 64  # and of each character that it is given
STEP = 128  # what a turn of a loop, a call or an item of a list costs, in characters
SECONDS = 20
# Methods and filters by which a number becomes a length; no chat template has a use for them,
LENGTHENING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "batch", "slice", "wordwrap"}
# and those that have one, for small numbers.
WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{4}|\*)")  # "%9999d", "%*d"
WIDE_COLUMN = {"%": WIDE_PERCENT, "format": WIDE_PERCENT, "{}": re.compile(r"\{[^{}]*(\d{4}|\{)")}
WIDENING = {"indent", "round", "tojson"}
# These make at most the product of the two largest of what they are given.
MULTIPLYING = {"%", "format", "{}", "indent", "replace", "tojson", "translate", "xmlattr"}


class Refused(jinja2.TemplateError):
    """Raised where a template exceeds its budget."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Runs templates with the options, filters and functions that transformers gives them, and a budget."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation])
        self.allow({})
        self.finalize = self.written  # Jinja passes it every value on its way into the text
        filters = {name: f for name, f in self.filters.items() if name not in LENGTHENING}
        filters |= {"tojson": tojson, "join": self.join}
        self.filters = {name: self.watched(name, f) for name, f in filters.items()}
        self.globals |= {"namespace": SafeNamespace, "raise_exception": fail, "strftime_now": strftime_now}
        del self.globals["lipsum"]

    def allow(self, given: dict) -> None:
        """Set a fresh budget, for a template that is given these variables."""
        self.left = BUDGET + PER_CHARACTER * text_size(given, limit=2**40)
        self.until = time.monotonic() + SECONDS

    def spend(self, characters: int) -> None:
        """Take characters, and a step, off the budget; raises Refused when it is used up."""
        self.left -= characters + STEP
        if self.left < 0 or time.monotonic() > self.until:
            raise Refused("it takes too long, or its text is too long")

    def written(self, value):
        """Return a value that is about to become text, paid for."""
        self.spend(text_size(value, self.left))
        return value

    def made(self, value):
        """Return a value that a call or an operator has made, paid for."""
        if isinstance(value, int) and value.bit_length() > 4096:
            raise Refused("a number in it is too large")
        many = isinstance(value, list | tuple)
        self.spend(STEP * len(value) if many else len(value) if isinstance(value, str) else 0)
        return value

    def fits(self, name: str, *values) -> None:
        """Raise Refused where an operation could make more of these values than the budget allows."""
        *_, a, b = 1, 1, *sorted(text_size(value, self.left) for value in values)
        if (a * b if name in MULTIPLYING else b) > self.left:
            raise Refused("its text is too long")
        if name in WIDE_COLUMN and WIDE_COLUMN[name].search(str(values[0]).replace("{{", "")):
            raise Refused("a column in it is too wide")
        if name in WIDENING and any(isinstance(v, int) and v > 1000 for v in values[1:]):
            raise Refused("a column in it is too wide")

    def watched(self, name: str, function, *subject):
        """Return a function with its arguments checked before, and its result paid for after."""

        @functools.wraps(function)
        def call(*values, **named):
            self.fits(name, *subject, *values, *named.values())
            return self.made(function(*values, **named))

        return call

    def join(self, value, d="", attribute=None):
        """Return the items as one text, as Jinja's filter does."""
        items = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self.spend(text_size(items, self.left) + len(items) * text_size(d, self.left))
        return str(d).join(map(str, items))

    # What Jinja calls: before it compiles; for an attribute, `text.format`, any other call, an operator.
    def _generate(self, source, *args, **kwargs):
        return super()._generate(Metered().visit(source), *args, **kwargs)

    def is_safe_attribute(self, obj, attr, value):
        """Return whether a template may read an attribute."""
        return attr not in LENGTHENING and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj, attribute):
        """Raise SecurityError: the template may not read this attribute."""
        raise SecurityError(f"it uses the attribute {attribute!r}, which is not allowed")

    def wrap_str_format(self, value):
        """Return `text.format` with its arguments checked; None for anything else."""
        wrapped = super().wrap_str_format(value)
        return wrapped and self.watched("{}", wrapped, value.__self__)

    def call(__self, __context, __obj, *args, **kwargs):  # as in Jinja: one of kwargs may be `self`
        """Return the result of a call in a template, checked and paid for."""
        subject, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(subject, str):
            if name == "join" and len(args) == 1:
                return __self.join(args[0], subject)
            __self.fits(name, subject, *args, *kwargs.values())
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        """Return the result of an operator in a template, checked and paid for."""
        if operator == "*":
            for what, times in ((left, right), (right, left)):
                repeats = isinstance(what, str | list | tuple) and isinstance(times, int)
                if repeats and text_size(what, self.left) * times > self.left:
                    raise Refused("its text is too long")
        if operator == "%" and isinstance(left, str):
            self.fits("%", left, right)
        if operator == "**" and not (abs(left) <= 2**64 and abs(right) <= 64):
            raise Refused("a number in it is too large")
        return self.made(super().call_binop(context, operator, left, right))


class Metered(NodeTransformer):
    """Rewrites a template so that turns of loops, calls of macros and joined texts are paid for."""

    def turn(self, node):
        """Return a loop or macro whose every turn is paid for."""
        self.generic_visit(node)
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(metered("spend", nodes.Const(constant))).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = turn

    def visit_Concat(self, node):
        """Return a joined text whose every part is paid for."""
        self.generic_visit(node)
        node.nodes = [metered("written", part) for part in node.nodes]
        return node


def metered(method: str, value: nodes.Expr) -> nodes.Call:
    """Return the expression that calls a method of the sandbox with a value."""
    return nodes.Call(nodes.EnvironmentAttribute(method), [value], [], None, None)


class Generation(ext.Extension):
    """Accepts `{% generation %}`, which marks what to train on and has no other meaning."""

    tags = {"generation"}  # noqa: RUF012  (as in Jinja)

    def parse(self, parser):
        """Return what the block holds."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class SafeNamespace(Namespace):
    """Holds names like Jinja's namespace, without the names that mean something to Python."""

    def __init__(*args, **kwargs):  # as in Jinja: one of the names may be `self`
        self, *given = args
        Namespace.__init__(self)
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise Refused(f"it has a variable {name}, and names may not begin with _")
        super().__setitem__(name, value)


def text_size(value, limit: int) -> int:
    """Return about how many characters a value is when written out; counting ends beyond the limit."""
    total, todo = 0, [value]
    while todo and total <= limit:
        value = todo.pop()
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, Mapping):
            todo.append(value.items())
        elif isinstance(value, list | tuple | set | KeysView | ValuesView | ItemsView):
            total += STEP * len(value)
            todo.extend(value)
        else:
            total += 1
    return total


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Return a value as JSON. Jinja's own filter escapes markup of HTML, which a model was not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def fail(message):
    """Raise the error of a template's own call of `raise_exception`."""
    raise jinja2.TemplateError(str(message))


def strftime_now(form: str) -> str:
    """Return the current local time in a format of strftime."""
    return datetime.now().strftime(form)
