"""What sources' documents are read from, by content: the same where nothing has changed, whatever its date.

Bytes are hashed and no document is read. A stream may be of more than one wants to read whole, so that its files count
by name, size and date.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from coldstill.pipeline.recipe.data import SourceConfig
from coldstill.pipeline.rows import builtin_corpus
from coldstill.pipeline.rows.sources import is_builtin, located

# A file of a data set on the hub says which commit it is of; what lies there is its content.
_OF_A_COMMIT = "hf://"
_READ_AT_ONCE_BYTES = 8 << 20
_SHOWN_AFTER_S = 5.0


def contents_of(sources: Sequence[SourceConfig], *, show_progress: bool = False) -> list[list[str]] | None:
    """Say what each source is read from; None where that cannot be told of one, or where nothing can be read.

    Args:
        sources: The sources; a file of several is read once.
        show_progress: Whether to show a progress bar, where it takes a while.

    Raises:
        DataError: A source names a file that is not there, or does not say how or what to read.
        OSError: A file cannot be read.
    """
    found = []
    for source in sources:
        facts = _facts_of(source)
        if facts is None:
            return None
        found.append(facts)
    digests = _digests({fact for facts in found for fact in facts if isinstance(fact, Path)}, show_progress)
    return [[digests[fact] if isinstance(fact, Path) else fact for fact in facts] for facts in found]


def _facts_of(source: SourceConfig) -> list[str | Path] | None:
    """Say what a source is read from, with files that are still to be read."""
    if is_builtin(source):
        return [*builtin_corpus.files()]
    found = located(source)
    import datasets

    try:
        builder = datasets.load_dataset_builder(
            found.path,
            found.name,
            data_dir=found.data_dir,
            data_files=found.data_files,
            revision=found.revision,
            **found.options,
        )
    except Exception:  # why it cannot be loaded is said when it is
        return None
    files = getattr(builder.config, "data_files", None)
    if not files:
        # As a data set is known that is here, while the hub is not.
        return [str(builder.cache_dir)] if builder.hash else None
    facts: list[str | Path] = []
    for split, of_split in files.items():
        facts.append(str(split))
        for file in map(str, of_split):
            if file.startswith(_OF_A_COMMIT) and "@" in file:
                facts.append(file)
            elif "://" in file:
                return None
            else:
                facts += _stamp(Path(file)) if source.streaming else [Path(file)]
    return facts


def _stamp(file: Path) -> Iterator[str]:
    status = file.stat()
    yield from map(str, (file, status.st_size, status.st_mtime_ns))


def _digests(files: Collection[Path], show_progress: bool) -> dict[Path, str]:
    digests = {}
    with tqdm(
        total=sum(file.stat().st_size for file in files),
        unit="B",
        unit_scale=True,
        desc="hash the text",
        disable=not show_progress,
        delay=_SHOWN_AFTER_S,
    ) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while part := stream.read(_READ_AT_ONCE_BYTES):
                    digest.update(part)
                    bar.update(len(part))
            digests[file] = digest.hexdigest()
    return digests
