"""Chat templates that would take hours or a machine's memory."""

# ruff: noqa: E501  # a template reads best on one line

from __future__ import annotations

DOUBLED = (
    "{% set ns = namespace(x=START) %}{% for _ in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x | length }}"
)
NAMES = "{% set ns = namespace(x=1) %}{% for _ in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loop whose test is never true": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(10**9) %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "output in a macro": "{% macro m() %}{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endmacro %}{% set y = m() %}",
    "output in a block": "{% set y %}{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "multiplied text": "{{ 'x' * 10**10 }}",
    "multiplied list": "{{ ([1] * 10**9) | length }}",
    "multiplied list of text": "{{ ['x' * 1000000] * 1000000 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "power of powers": "{{ ((9 ** 999) ** 999) ** 999 }}",
    "doubled text by +": DOUBLED.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
    "doubled text by ~": DOUBLED.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "doubled list": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "doubled dict": DOUBLED.replace("START", "1").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "doubled tuple": DOUBLED.replace("START", "1").replace("STEP", "(ns.x, ns.x)"),
    "doubled by dict()": DOUBLED.replace("START", "1").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "doubled by format": DOUBLED.replace("START", "'ab'").replace("STEP", "'{0}{0}'.format(ns.x)"),
    "doubled by %": DOUBLED.replace("START", "'ab'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "doubled by the filter format": DOUBLED.replace("START", "'ab'").replace("STEP", "'%s%s' | format(ns.x, ns.x)"),
    "doubled by join": DOUBLED.replace("START", "'ab'").replace("STEP", "[ns.x, ns.x] | join"),
    "doubled by replace": DOUBLED.replace("START", "'ab'").replace("STEP", "ns.x.replace('a', ns.x)"),
    "nested namespaces": NAMES,
    "nested namespaces in a filter": NAMES.replace("{{ ns.x }}", "{{ ns.x | string | length }}"),
    "nested namespaces by ~": NAMES.replace("{{ ns.x }}", "{{ ns.x ~ '' }}"),
    "joined by a long separator": "{{ range(99999) | join('x' * 1000000) }}",
    "joined by the method": "{{ ('x' * 1000000).join('y' * 1000000) }}",
    "joined generator": "{{ ('x' * 1000000).join(range(99999) | map('string')) | length }}",
    "replaced by a long text": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) | length }}",
    "replaced within": "{{ ('a' * 1000000).replace('', 'b' * 1000000) | length }}",
    "centred": "{{ 'x' | center(10**10) }}",
    "justified": "{{ 'x'.ljust(10**10) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(99999) | length }}",
    "indented": "{{ ('\\n' * 1000000) | indent(99999) | length }}",
    "indented by text": "{{ ('\\n' * 1000000) | indent('x' * 1000000) | length }}",
    "wide format": "{{ '{:>10000000000}'.format('x') }}",
    "wide nested format": "{{ '{:>{w}}'.format('x', w=99999) * 99999 }}",
    "wide nested item": "{{ '{:>{0[0]}}'.format([10**10]) }}",
    "wide %": "{{ '%10000000000d' % 1 }}",
    "wide filter": "{{ '%10000000000d' | format(1) }}",
    "wide by star": "{{ '%*d' % (10**10, 1) }}",
    "json indents": "{{ (range(99999) | list) | tojson(indent=99999) }}",
    "summed lists": "{{ ([[1] * 900] * 900) | sum(start=[]) | length }}",
    "slow tests": "{{ range(99999) | select('in', range(99999) | list | reverse | list) | list | length }}",
    "copies by slice": "{% set ns = namespace(x=[]) %}{% set t = 'x' * 3000000 %}{% for _ in range(99999) %}{% set ns.x = ns.x + [t[1:]] %}{% endfor %}",
    "copies by method": "{% set ns = namespace(x=[]) %}{% set t = 'x' * 3000000 %}{% for _ in range(99999) %}{% set ns.x = [ns.x, t.upper()] %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a tree of calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% set ns = namespace(x=[]) %}{% for i in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "quotient of large integers": "{% set f = 'f' ~ messages[0].absent %}{% set a=(f*3900000)|int(base=16) %}{% set b=(f*1900000)|int(base=16) %}{{ (a//b) is odd }}",
    "remainder of large integers": "{% set f = 'f' ~ messages[0].absent %}{% set a=(f*3900000)|int(base=16) %}{% set b=(f*1900000)|int(base=16) %}{{ a % b }}",
    "sum of large integers": "{% set f = 'f' ~ messages[0].absent %}{% set a=(f*3900000)|int(base=16) %}{{ ([a]*1000000)|sum }}",
    "a long sum to compile": "{{ a" + "~a" * 190000 + " }}",
    "many expressions to compile": "{{a}}" * 79000,
    "translated": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) | length }}",
}  # fmt: skip
# What only takes long to compile may fit in the limits on a fast processor. This never ends, wherever that is noticed.
BOMBS["many expressions, then loops"] = "{{a}}" * 70000 + BOMBS["nested loops"]
