"""Where a recipe's rows are: kept by content beside the stores, so that they are made once, or in a temporary folder.

A folder of rows holds a file for each split and `rows.json`, which says what was counted; it appears whole or not at
all.
"""

import contextlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from coldstill.cache.identity import FINGERPRINT_CHARS, digest_of
from coldstill.cache.kept_folders import CHECKSUMS, fetch_folder, find_damage, publish_folder, write_checksums
from coldstill.cache.labels import RowLabels
from coldstill.cache.objects import open_objects
from coldstill.cache.records import scratch_folder
from coldstill.cache.spans import RowSpans
from coldstill.pipeline.outputs.places import beside_stores
from coldstill.pipeline.outputs.run_index import KEPT_ROWS
from coldstill.pipeline.recipe.data import DataConfig
from coldstill.pipeline.recipe.sections import Recipe
from coldstill.pipeline.rows.contents import contents_of
from coldstill.pipeline.rows.row_files import Row, RowFile, RowView, batch_rows
from coldstill.pipeline.rows.tokenising import DocumentTokenizer
from coldstill.pipeline.runtime.errors import DataError
from coldstill.pipeline.runtime.whole import sweep_siblings, whole_folder

# Part of what rows are kept by: a change of how they are made makes those that are kept stale.
_VERSION = 1
_COUNTS = "rows.json"
TRAIN_FILE, EVAL_FILE = "train.arrow", "eval.arrow"


@dataclass
class RowCounts:
    """What was counted while rows of one source were made.

    Attributes:
        num_rows: Rows.
        num_tokens: Tokens of all rows.
        largest_id: The largest token id of them; -1 where there are none.
        num_documents: How many documents were read for them; with one source, those of eval are among train's.
        num_shared: How many documents and rows were left out because eval has them.
        num_filled: How many documents were left out because their prompt alone fills a row.
        shortest_filling: Tokens of the shortest of these prompts; 0 where there are none.
    """

    num_rows: int = 0
    num_tokens: int = 0
    largest_id: int = -1
    num_documents: int = 0
    num_shared: int = 0
    num_filled: int = 0
    shortest_filling: int = 0


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in a file.

    Attributes:
        file: The file.
        counts: What was counted while they were made.
        domains: Where the rows are of several sources: the label of each, in the order of their rows, with how many.
    """

    file: RowFile
    counts: RowCounts
    domains: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.file)

    @property
    def tokens(self) -> RowView[np.ndarray]:
        """Each row's token ids, [T], uint32."""
        return RowView(len(self.file), self.file.tokens)

    @property
    def rows(self) -> RowView[Row]:
        """Each row."""
        return RowView(len(self.file), self.file.row)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.counts.num_tokens

    @property
    def num_documents(self) -> int:
        """How many documents were read for the rows."""
        return self.counts.num_documents

    @property
    def num_shared(self) -> int:
        """How many documents and rows were left out because eval has them."""
        return self.counts.num_shared

    def slices(self) -> Iterator[np.ndarray]:
        """Yield the ids and lengths of all rows, as `coldstill.cache.laying` takes them."""
        return self.file.places()

    def spans(self) -> RowSpans:
        """Return the spans of all rows."""
        spans = RowSpans()
        for part in self.file.spans():
            spans.append(*part)
        return spans

    def labels(self) -> RowLabels:
        """Return the labels of all rows."""
        labels: RowLabels | None = None
        for part in self.file.labels():
            if labels is None:
                labels = RowLabels(part.shape[1])
            labels.append(part)
        return RowLabels() if labels is None else labels


@dataclass(frozen=True)
class MadeRows:
    """The rows of a recipe's data section.

    Attributes:
        train: The train rows.
        held_out: The eval rows.
        of_sources: What was counted of each source of eval rows.
    """

    train: Rows
    held_out: Rows
    of_sources: list[RowCounts]


class _TemporaryFolder:
    """A folder that is there as long as this object is."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="coldstill-rows-", dir=scratch_folder()))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _MadeByAnotherError(Exception):
    """The same rows are there already, and somebody may be reading them."""


Build = Callable[[Path], tuple[RowCounts, list[RowCounts]]]


@dataclass(frozen=True)
class RowsPlace:
    """Where folders of rows are kept.

    Attributes:
        folder: The local folder that they are in.
        root: The root on object storage that it holds copies of; None where it is a place of its own.
    """

    folder: Path
    root: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return where a recipe's rows are kept: beside the stores, and in a copy where these are remote."""
        return cls(beside_stores(recipe) / KEPT_ROWS, recipe.cache if "://" in recipe.cache else None)

    def publish(self, folder: Path) -> None:
        """Let other machines find rows."""
        if self.root is not None:
            publish_folder(open_objects(self.root), f"{KEPT_ROWS}/{folder.name}", folder)

    def fetch(self, key: str, folder: Path) -> bool:
        """Copy rows from object storage into a folder, and say whether they are there, and whole."""
        if self.root is None or not open_objects(self.root).exists(f"{KEPT_ROWS}/{key}/{CHECKSUMS}"):
            return False
        if fetch_folder(open_objects(self.root), f"{KEPT_ROWS}/{key}", folder) is None:
            return True
        for file in folder.iterdir():
            file.unlink()
        return False


def make_once(
    data: DataConfig,
    tokenizer: Any,
    digest: str,
    build: Build,
    *,
    keep_in: RowsPlace | None,
    is_dry: bool,
    show_progress: bool,
) -> MadeRows:
    """Find the rows of a data section where they are kept, or make and keep them.

    Args:
        data: The data section.
        tokenizer: Its tokenizer.
        digest: Of what the tokenizer does.
        build: Makes the rows in a folder, and gives what it counted of train and of each source of eval rows.
        keep_in: Where rows are kept; None to make them for this process alone.
        is_dry: Whether to keep nothing that is not kept yet.
        show_progress: Whether to show a progress bar, where finding out what the text is takes a while.

    Raises:
        DataError: A source is missing or empty, has no such column, or gives no row.
    """
    key = None if keep_in is None else _key(data, tokenizer, digest, show_progress=show_progress)
    if keep_in is None or key is None:
        temporary = _TemporaryFolder()
        _build_into(temporary.path, build)
        return _read(temporary.path, data, temporary)
    folder = keep_in.folder / key
    if not _is_whole(folder):
        if is_dry:
            temporary = _TemporaryFolder()
            if not keep_in.fetch(key, temporary.path):
                _build_into(temporary.path, build)
            return _read(temporary.path, data, temporary)
        _keep(folder, build, keep_in)
    if not is_dry:
        keep_in.publish(folder)
    return _read(folder, data, None)


def _keep(folder: Path, build: Build, keep_in: RowsPlace) -> None:
    for left in folder.parent.glob(".*"):
        # Also of rows that nobody asks for any more.
        sweep_siblings(folder.with_name(left.name.split(".")[1]))
    with contextlib.suppress(_MadeByAnotherError), whole_folder(folder) as partial:
        if not keep_in.fetch(folder.name, partial):
            _build_into(partial, build)
            write_checksums(partial)
        if _is_whole(folder):
            raise _MadeByAnotherError


def _key(data: DataConfig, tokenizer: Any, digest: str, *, show_progress: bool) -> str | None:
    """Name rows by all that decides them; None where it cannot be told what they would be made of."""
    try:
        contents = contents_of([data.train, *data.eval_sources], show_progress=show_progress)
    except (DataError, OSError):  # what is wrong is said by who reads the documents
        return None
    if contents is None:
        return None
    facts = {
        "version": _VERSION,
        "data": data.identity(),
        "prompt_weight": data.prompt_weight,
        "contents": contents,
        "tokenizer": [digest, DocumentTokenizer(tokenizer, append_eos=data.append_eos).describe()],
    }
    return digest_of(facts)[:FINGERPRINT_CHARS]


def _is_whole(folder: Path) -> bool:
    """Whether rows are there as they were written; what is damaged is made anew."""
    return folder.is_dir() and find_damage(open_objects(folder.parent), folder.name) is None


def _build_into(folder: Path, build: Build) -> None:
    train, of_sources = build(folder)
    said = {"train": asdict(train), "eval": [asdict(counts) for counts in of_sources]}
    (folder / _COUNTS).write_text(json.dumps(said, indent=1) + "\n")


def _read(folder: Path, data: DataConfig, temporary: "_TemporaryFolder | None") -> MadeRows:
    said = json.loads((folder / _COUNTS).read_text())
    train, of_sources = RowCounts(**said["train"]), [RowCounts(**counts) for counts in said["eval"]]
    held_out = _total(of_sources)
    domains = {label: counts.num_rows for label, counts in zip(data.eval_labels, of_sources, strict=False)}

    def rows(name: str, counts: RowCounts, domains: dict[str, int]) -> Rows:
        num_batch_rows = batch_rows(data.sequence_length)
        file = RowFile(folder / name, num_rows=counts.num_rows, num_batch_rows=num_batch_rows, folder=temporary)
        return Rows(file, counts, domains)

    return MadeRows(rows(TRAIN_FILE, train, {}), rows(EVAL_FILE, held_out, domains), of_sources)


def _total(of_sources: list[RowCounts]) -> RowCounts:
    """Add up what was counted; of one source it is what it is."""
    if len(of_sources) == 1:
        return of_sources[0]
    return RowCounts(
        num_rows=sum(counts.num_rows for counts in of_sources),
        num_tokens=sum(counts.num_tokens for counts in of_sources),
        largest_id=max(counts.largest_id for counts in of_sources),
        num_documents=sum(counts.num_documents for counts in of_sources),
    )
