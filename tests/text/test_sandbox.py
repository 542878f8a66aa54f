"""A chat template of unknown origin renders as in transformers, and cannot do harm."""

import time

import pytest

from refengine.spec.config import InputError
from refengine.text.chat_template import ChatTemplate
from tests.support.vocabularies import TINY

pytestmark = pytest.mark.slow

resource = pytest.importorskip("resource", reason="memory is measured as Unix does")

HI = [{"role": "user", "content": "Hi <b>ü</b>"}, {"role": "assistant", "content": "Ho", "n": 3}]


def render(source, messages=HI, **switches):
    return ChatTemplate({"default": source}).render(messages, **switches)


@pytest.mark.parametrize("source", [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "{{ messages|tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
    "{% if i > 4 %}{% break %}{% endif %}{% endfor %}",
    "{% generation %}{{ messages[1].content }}{% endgeneration %}",
    "{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + 1 %}{{ ns.a ~ '/' ~ ns.self }}",
    "{% macro f(x) %}[{{ x }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}{% call f(2) %}!{% endcall %}",
    "{% for m in messages recursive %}{{ m.role }}{{ loop(m.kids) if m.kids }}{{ loop.last }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ ', '.join(['a', 'b']) }}",
    "{{ messages | selectattr('n') | list | length }}{{ messages[5] is defined }}{{ x | default(1) }}",
    "{{ '%s is %03d' % ('x', 5) }}{{ '{:>5}'.format(7) }}{{ '%d' | format(1700000000) }}",
    "{{ 7 % 3 }}{{ 'ab' * 3 }}{{ 2 ** 5 }}{{ messages[0].content | replace('b', 'i') | upper | indent(2) }}",
    "{{ '{{{}}} in 2026: 100%'.format(1) }}{{ '%(a)s' % {'a': 3} }}{{ 2.5 | round(1) }}",
    "{{ strftime_now('%Y') | length }}{{ bos_token is defined }}{{ thinking }}{{ dict(a=1).items() | list }}",
    "{% set x %}<{{ thinking }}>{% endset %}{{ x }}{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}",
    (TINY / "chat_template.jinja").read_text(),
])  # fmt: skip
def test_a_template_renders_as_in_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template([HI], chat_template=source, add_generation_prompt=True, thinking=True)
    assert render(source, thinking=True) == expected[0]


@pytest.mark.parametrize("source", [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages | attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os }}", "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}", "{{ namespace(__class__=1) }}", "{{ '{0.__class__}'.format(1) }}",
    "{% set n = namespace() %}{% set n._x = 1 %}", "{{ lipsum() }}", "{{ open('/etc/passwd') }}",
    "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}",
    "{% include 'a' %}", "{% import 'os' as os %}", "{% extends 'a' %}",
    "{{ (messages | map('attr', '__class__') | list)[0] }}",
])  # fmt: skip
def test_a_template_that_reaches_for_python_is_refused(source):
    with pytest.raises(InputError, match="the chat template cannot render these messages") as refused:
        render(source)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


GROW = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"


def grow(start, step):
    return GROW.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize("source", [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{{ 'ha' }}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 9) | list }}", "{{ 'a' * 10 ** 10 }}", "{{ 10 ** 10 * 'a' }}", "{{ [0] * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}", grow("9", "n.x * n.x"), grow("'a'", "n.x + n.x"), grow("'a'", "n.x ~ n.x"),
    grow("'a'", "n.x ~ 'b' ~ n.x"), grow("'aa'", "n.x.replace('a', n.x)"),
    grow("'aa'", "n.x | replace('a', n.x)"),
    grow("'a'", "[n.x, n.x] | join"), grow("'a'", "''.join([n.x, n.x])"), grow("[1]", "n.x + n.x"),
    grow("[1]", "[n.x, n.x]"), grow("{'a': 1}", "{'a': n.x, 'b': n.x}"), grow("'a'", "'%s%s' % (n.x, n.x)"),
    grow("[1]", "[n.x, n.x]").replace("n.x }}", "n.x | tojson | length }}"),
    grow("[1]", "[n.x, n.x]").replace("n.x }}", "n.x | string | length }}"),
    grow("'a'", "'{0}{0}'.format(n.x)"), grow("'a'", "'%s%s' | format(n.x, n.x)"),
    "{{ '%(n)999999999d' % {'n': 1} }}", "{{ 1.5 | round(10 ** 10, 'ceil') }}",
    "{{ '%999999999d' % 1 }}", "{{ '%*d' % (999999999, 1) }}", "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 999999999) }}", "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}", "{{ 'a'.ljust(10 ** 10) }}", "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{{ 'a\nb' | indent(10 ** 10) }}", "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ [1] | batch(10 ** 10, 0) | list }}", "{{ [1] | slice(10 ** 10) | list }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
])  # fmt: skip
def test_a_template_that_would_not_end_or_would_fill_the_memory_is_refused(source):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError, match="the chat template"):
        render(source)
    assert time.process_time() - began < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kilobytes


@pytest.mark.parametrize("source, says", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages.nothing.at_all }}", "has no attribute 'nothing'"), ("\n{% if %}", "not Jinja in line 2"),
    ("{{ 'a' + 1 }}", "concatenate"), ("{% for %}", "not Jinja in line 1"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
])  # fmt: skip
def test_a_template_that_fails_says_why_in_one_sentence(source, says):
    with pytest.raises(InputError, match=says) as refused:
        render(source)
    assert "\n" not in str(refused.value)


def test_a_long_conversation_is_within_the_budget():
    messages = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant") * 200]
    assert len(ChatTemplate.load(TINY).render(messages)) > 4_000_000
    again = ChatTemplate.load(TINY)
    assert again.render(HI) == again.render(HI), "every rendering has a budget of its own"
