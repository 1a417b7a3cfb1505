"""The tree of errors, as it is drawn where a reader looks, against the classes."""

import re

import coldstill
from coldstill.cache.errors import ColdstillError, StoreError
from coldstill.pipeline.runtime import errors

DRAWN = re.compile(r"^ {4}((?:│|├──|└──|\s)*)(\w+Error)(?: \((\w+)\))?", re.MULTILINE)


def below(error: type[Exception]) -> set[type[Exception]]:
    """The classes of this project's own that are derived from an error, and itself."""
    own = [derived for derived in error.__subclasses__() if derived.__module__.startswith("coldstill.")]
    return {error}.union(*map(below, own))


def test_the_tree_in_the_docstring_has_every_error_under_its_parent_and_the_builtin_that_it_is():
    drawn = {name: (depth, builtin) for depth, name, builtin in DRAWN.findall(errors.__doc__)}
    assert drawn.keys() == {error.__name__ for error in below(ColdstillError)}
    for error in below(ColdstillError) - {ColdstillError}:
        depth, builtin = drawn[error.__name__]
        is_of_store = issubclass(error, StoreError) and error is not StoreError
        assert len(depth) == (8 if is_of_store else 4), error
        assert [base.__name__ for base in error.__bases__[1:]] == ([builtin] if builtin else [])


def test_one_error_catches_all_and_is_named_at_the_root():
    assert coldstill.ColdstillError is ColdstillError
