"""Hold everything below a root against what was written: its stores, its index, the folders that are kept there.

Which folders these are, the caller says: `kept` maps a kind, by which the index and problems name it, to the place of
all folders of that kind below the root.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from coldstill.cache.audit import Problem, StoreAudit, audit_store, stored_bytes
from coldstill.cache.errors import CorruptError, FormatError, StoreNotFoundError
from coldstill.cache.index import INDEX, parse_entry
from coldstill.cache.kept_folders import CHECKSUMS, find_damage
from coldstill.cache.manifest import COMMITS
from coldstill.cache.objects import Objects, full_path, open_objects
from coldstill.cache.rows import ROWS
from coldstill.cache.selections import selection_file
from coldstill.cache.store import ROOT_METADATA, STORES, Store, open_store, store_path


@dataclass
class RootAudit:
    """What an audit of a root found.

    Attributes:
        root: The root.
        stores: What was found in each store.
        problems: What is wrong outside of them, or keeps a store from being opened at all.
    """

    root: str
    stores: list[StoreAudit] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether everything is as it was written."""
        return not self.problems and not any(store.problems for store in self.stores)


def audit_root(root: str, *, kept: Mapping[str, str], show_progress: bool = True) -> RootAudit:
    """Read every byte below a root and hold it against its checksum.

    Args:
        root: The root.
        kept: By kind, the place of the folders that are kept beside the stores.
        show_progress: Whether to show a progress bar.

    Raises:
        StoreNotFoundError: The root holds nothing of Coldstill's.
        RemoteError: Object storage does not answer.
    """
    objects = open_objects(root)
    audit = RootAudit(root)
    names = objects.folders(STORES)
    if not names and not objects.files(INDEX):
        raise StoreNotFoundError(f"no store in {full_path(root)}; a root is what a recipe names as `cache`")
    stores = list(_open_stores(root, names, audit))
    total = sum(stored_bytes(store) for store in stores)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not show_progress) as bar:
        for store in stores:
            audit.stores.append(audit_store(store, on_bytes=bar.update))
    audit.problems += index_problems(objects, kept=kept)
    audit.problems += folder_problems(objects, kept=kept)
    return audit


def _open_stores(root: str, names: list[str], audit: RootAudit) -> Iterator[Store]:
    for name in names:
        path = store_path(root, name)
        try:
            yield open_store(path)
        except StoreNotFoundError:
            if holds_data(open_objects(path)):
                what = "is missing, but the store holds data"
                audit.problems.append(Problem("store", f"{STORES}/{name}/{ROOT_METADATA}", what))
        except (CorruptError, FormatError) as error:
            audit.problems.append(Problem("store", f"{STORES}/{name}/{ROOT_METADATA}", str(error)))


def holds_data(objects: Objects) -> bool:
    """Whether a folder has a store's data, whatever its root metadata says."""
    return bool(objects.files(COMMITS) or objects.files(ROWS))


def index_problems(objects: Objects, *, kept: Mapping[str, str]) -> list[Problem]:
    """Check that each entry of the index is whole and leads to something."""
    problems = []
    for file in objects.files(INDEX):
        name = f"{INDEX}/{file}"
        try:
            value = parse_entry(file, objects.read(name))
            targets = _targets(file.rpartition("-")[0], value, kept)
        except (ValueError, KeyError, TypeError):
            problems.append(Problem("index", name, "is not what was written"))
            continue
        lacking = [target for target in targets if not objects.exists(target)]
        if lacking:
            problems.append(Problem("index", name, f"leads to {lacking[0]}, which is not there"))
    return problems


def _targets(kind: str, value: Mapping[str, Any], kept: Mapping[str, str]) -> list[str]:
    """Name the objects that an index entry leads to."""
    if kind in kept and "folder" in value:
        return [f"{kept[kind]}/{value['folder']}/{CHECKSUMS}"]
    if "store" not in value:
        return []  # the entry is the answer itself, such as a model's score on a task
    return [f"{STORES}/{value['store']}/{selection_file(name)}" for name in value["selections"].values()]


def folder_problems(objects: Objects, *, kept: Mapping[str, str]) -> list[Problem]:
    """Check that every file of each kept folder is whole; a problem's kind is the folder's."""
    problems = []
    for kind, place in kept.items():
        for name in objects.folders(place):
            if name.startswith("."):
                continue  # half-made by a process that was killed; swept when the folder is made
            if what := find_damage(objects, f"{place}/{name}"):
                problems.append(Problem(kind, f"{place}/{name}", what))
    return problems
