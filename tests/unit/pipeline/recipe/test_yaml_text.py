"""YAML in which nothing that was written is lost: keys given twice, and merges that replace what was said."""

import pytest

from coldstill.pipeline.recipe.yaml_text import parse_yaml
from coldstill.pipeline.runtime.errors import RecipeError

WHICH = "; say behind << which one is meant"
TWICE = {
    "a-key": (
        "loss:\n  alpha: 1\n  beta: 1\n  alpha: 2\n",
        "key 'loss.alpha' is given twice in r: line 2 and line 4; keep one",
    ),
    "a-section": ("loss: {}\ntrain: {}\nloss: {}\n", "key 'loss' is given twice in r: line 1 and line 3; keep one"),
    "the-same-value": ("a: 1\na: 1\n", "key 'a' is given twice in r: line 1 and line 2; keep one"),
    "in-a-list": ("a:\n- x: 1\n- y: 1\n  y: 2\n", "key 'a.y' is given twice in r: line 3 and line 4; keep one"),
    "in-braces": ("a: {x: 1,\n x: 2}\n", "key 'a.x' is given twice in r: line 1 and line 2; keep one"),
    "one-number-in-two-spellings": (
        "pairs:\n  10: 1\n  0xA: 2\n",
        "key 'pairs.10' is given twice in r: line 2 and line 3; keep one",
    ),
    "in-what-an-alias-leads-to": (
        "a: &a\n  x: 1\n  x: 2\nb: *a\n",
        "key 'a.x' is given twice in r: line 2 and line 3; keep one",
    ),
    "a-merge-behind-the-maps-own-value": (
        "base: &base\n  alpha: 1\nloss:\n  alpha: 2\n  <<: *base\n",
        "key 'loss.alpha' is given twice in r: line 4 and line 2, which << in line 5 merges behind it; put << first, "
        "where the map's own value is meant",
    ),
    "two-merges": (
        "a: &a {x: 1}\nb: &b {x: 2}\nc:\n  <<: [*a, *b]\n",
        "key 'c.x' is given twice in r: line 1 and line 2, both merged by << in line 4" + WHICH,
    ),
    "two-merge-keys": (
        "a: &a {x: 1}\nb: &b {x: 2}\nc:\n  <<: *a\n  <<: *b\n",
        "key 'c.x' is given twice in r: line 1 and line 2, both merged by << in line 5" + WHICH,
    ),
    "a-merge-of-a-merge": (
        "a: &a {x: 1}\nb: &b {<<: *a, y: 1}\nc: &c {x: 2}\nd:\n  <<: [*b, *c]\n",
        "key 'd.x' is given twice in r: line 1 and line 3, both merged by << in line 5" + WHICH,
    ),
}


@pytest.mark.parametrize(("text", "message"), TWICE.values(), ids=TWICE)
def test_a_value_that_would_be_lost_is_refused_with_its_key_and_both_lines(text: str, message: str):
    with pytest.raises(RecipeError) as refused:
        parse_yaml(text, name="r")
    assert str(refused.value) == message


KEPT = {
    "an-alias": ("a: &a {x: 1}\nb: *a\nc: *a\n", {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}),
    "a-value-of-its-own-behind-a-merge": (
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n",
        {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}},
    ),
    "a-merge-that-adds": ("a: &a {x: 1}\nb: {y: 3, <<: *a}\n", {"a": {"x": 1}, "b": {"x": 1, "y": 3}}),
    "merges-that-agree": (
        "a: &a {x: [1]}\nb: &b {x: [1]}\nc: {<<: [*a, *b]}\n",
        {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [1]}},
    ),
    "merges-of-which-the-map-says-which": (
        "a: &a {x: 1}\nb: &b {x: 2}\nc: {<<: [*a, *b], x: 3}\n",
        {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}},
    ),
    "one-name-in-two-sections": ("a: {x: 1}\nb: {x: 2}\n", {"a": {"x": 1}, "b": {"x": 2}}),
    "a-map-merged-twice": ("a: &a {x: 1}\nb: {<<: *a}\nc: {<<: *a}\n", {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}),
    "a-text-and-a-number": ("{1: a, '1': b}", {1: "a", "1": "b"}),
}


@pytest.mark.parametrize(("text", "value"), KEPT.values(), ids=KEPT)
def test_what_loses_nothing_is_read_as_yaml_reads_it(text: str, value: object):
    assert parse_yaml(text, name="r") == value


WRONG = {
    "a-tab": ("a:\n\tb: 1\n", "r is not YAML: line 2 has a tab; YAML indents by spaces"),
    "a-bracket": ("a: [1\n", "r is not YAML: line 2, column 1: expected ',' or ']'"),
    "indentation": ("a: 1\n b: 2\n", "r is not YAML: line 2, column 3: mapping values are not allowed here"),
    "an-anchor-twice": ("a: &x 1\nb: &x 2\n", "r is not YAML: line 2, column 4: second occurrence .*'x'.* line 1"),
    "no-such-anchor": ("a: *x\n", "r is not YAML: line 1, column 4: found undefined alias 'x'"),
    "two-documents": ("--- a\n--- b\n", "r is not YAML: line 2, column 1: .*another document"),
    "no-date": ("a: 2020-13-45\n", "r is not YAML: month must be in 1..12"),
    "no-text": ("a: \x00\n", "r is not YAML: unacceptable character"),
    "a-map-as-a-key": ("? {a: 1}\n: 2\n", "r is not YAML: line 1, column 3: found unhashable key"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_yaml_is_one_line_with_the_line_of_the_file(text: str, message: str):
    with pytest.raises(RecipeError, match=message) as refused:
        parse_yaml(text, name="r")
    assert "\n" not in str(refused.value)


def test_what_is_nested_without_end_is_one_line():
    with pytest.raises(RecipeError, match="^run.yaml is not YAML that can be read: it is nested too deeply$"):
        parse_yaml("output: " + "[" * 3000, name="run.yaml")
