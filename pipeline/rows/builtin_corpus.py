"""A text corpus that needs no download: what every CPython carries of its own documentation.

The Python language reference (`pydoc_data.topics`) and the docstrings of the standard library, read with `ast` so that
nothing is imported or run. A few megabytes of technical English, a little different between Python releases.
"""

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

NAME = "builtin:python-docs"

_SHORTEST_CHARACTERS = 80
_SHUFFLE_SEED = 0
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
)


def documents(library: Path | None = None) -> list[str]:
    """Return the corpus as documents, each once, in a fixed shuffled order, so that any prefix is a fair sample.

    Args:
        library: The folder whose modules are read beside the language reference; Python's own standard library by
            default.
    """
    library = library or _standard_library()
    distinct = dict.fromkeys(text.strip() for text in [*_language_reference(), *_docstrings(library)])
    texts = [text for text in distinct if len(text) >= _SHORTEST_CHARACTERS]
    random.Random(_SHUFFLE_SEED).shuffle(texts)  # noqa: S311 - nothing secret
    return texts


def files() -> list[Path]:
    """Name what the corpus is read from."""
    library = _standard_library()
    return [library / "pydoc_data/topics.py", *_modules(library)]


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules(library: Path) -> list[Path]:
    return [
        file
        for file in sorted(library.rglob("*.py"))
        if not _EXCLUDED_FOLDERS.intersection(file.relative_to(library).parts)
    ]


def _language_reference() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()


def _docstrings(library: Path) -> Iterator[str]:
    for file in _modules(library):
        yield from _docstrings_of(file)


def _docstrings_of(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Old modules hold escapes that newer compilers warn of; that is not the reader's concern.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return  # a template or a test fixture of bad syntax
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
