"""Any file of a root may be flipped, cut, emptied or lost: it is noticed, never read as wrong numbers, and mended."""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commanding import run_command
from crash.trees import difference, files_below, lasting, small_recipe

from coldstill.cache.errors import StoreError
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader, read_constants
from coldstill.cache.root_audit import RootAudit
from coldstill.cache.selections import list_selections, read_selection
from coldstill.cache.store import CONSTANTS, Store, open_store
from coldstill.pipeline.verify import verify

NUM_DAMAGES = 200
WAYS = ("flip", "cut", "empty", "delete")
HEAD = "output_head"


@dataclass(frozen=True)
class Damage:
    """What happens to one file.

    Attributes:
        file: Its path within the root.
        way: `flip` one byte, `cut` it short, `empty` it, or `delete` it.
        seed: Decides the byte or the length.
    """

    file: str
    way: str
    seed: int

    def apply(self, root: Path) -> None:
        path, generator = root / self.file, random.Random(self.seed)
        data = path.read_bytes()
        if self.way == "delete":
            path.unlink()
        elif self.way == "flip":
            place = generator.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << generator.randrange(8))]) + data[place + 1 :])
        else:
            path.write_bytes(data[: generator.randrange(1, len(data))] if self.way == "cut" else b"")

    def __str__(self) -> str:
        return f"{self.way} {self.file} (seed {self.seed})"


def kind_of(file: str) -> str:
    """Say what sort of file it is, by its path within the root."""
    folder, _, rest = file.partition("/")
    if folder == "index":
        return f"index of {rest.partition('-')[0]}"
    if folder == "students":
        return f"student's {rest.partition('/')[2]}"
    if folder == "rows":
        return f"kept rows' {rest.partition('/')[2]}"
    parts = rest.split("/")[1:]
    if parts[0] != "arrays.zarr":
        return parts[0]
    if parts[1:] == ["zarr.json"]:
        return "root metadata"
    where = "constant" if parts[1] == CONSTANTS else "shard"
    return f"{where} {'object' if parts[-1] != 'zarr.json' else f'metadata at depth {len(parts)}'}"


def is_harmless(damage: Damage) -> bool:
    """Whether a deletion loses nothing that is not known from elsewhere.

    Rows follow from the tokens of their shards, and the next `precompute` lists them again. An index entry only leads
    from a recipe to its rows or its student: without it `train` asks for `precompute`, which writes it again.
    """
    return damage.way == "delete" and (damage.file.startswith("index/") or kind_of(damage.file) == "rows")


def is_unread(store: Path, damage: Damage) -> bool:
    """Whether a flip hit bytes of a selection's Parquet file that no reader looks at: its content has the checksum."""
    if damage.way != "flip" or kind_of(damage.file) != "selections":
        return False
    try:
        read_selection(open_store(str(store)), Path(damage.file).stem)
    except StoreError:
        return False
    return True


@dataclass(frozen=True)
class Place:
    """A store as `precompute` left it, and what is to be read of it.

    Attributes:
        root: The root, which each damage leaves as it was.
        recipe: The recipe that made it.
        files: What is in the root.
        columns: The columns of each selection.
        values: Everything that is stored: selection -> rows, and the output head under `HEAD`.
    """

    root: Path
    recipe: Path
    files: dict[str, bytes]
    columns: dict[str, list[str]]
    values: dict[str, Any]

    @property
    def store(self) -> Path:
        return next((self.root / "stores").iterdir())

    @contextlib.contextmanager
    def damaged(self, damage: Damage) -> Iterator[None]:
        """Damage a file for as long as the `with` lasts."""
        damage.apply(self.root)
        try:
            yield
        finally:
            path = self.root / damage.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[damage.file])

    def restore(self) -> None:
        """Bring the whole root back to what it was, whatever was done to it."""
        shutil.rmtree(self.root)
        for name, data in self.files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(data)

    def guarded(self) -> list[str]:
        """Name the files that somebody reads: a student's record of how it was made is for people, and has no sum."""
        records = ("/recipe.yaml", "/provenance.json")
        return [name for name in sorted(self.files) if not (name.startswith("students/") and name.endswith(records))]

    def damages(self) -> list[Damage]:
        """Draw damages of all files that are guarded, one of each kind among them, the same ones each time."""
        generator = random.Random(0)
        names = self.guarded()
        files = list({kind_of(name): name for name in names}.values())
        files += generator.choices(names, k=NUM_DAMAGES - len(files))
        return [Damage(file, generator.choice(WAYS), seed) for seed, file in enumerate(files)]


@pytest.fixture(scope="module", autouse=True)
def _small_and_fast() -> Iterator[None]:
    """Make shards small; leave out syncs, as no test here outlives its machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("coldstill.cache.laying.SHARD_TOKENS", 96)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, Path], corpus: list[str]) -> Place:
    """A store of three shards and few columns."""
    folder = tmp_path_factory.mktemp("damage")
    mapping = {"strategy": "pairs", "pairs": {1: 1}}
    data = small_recipe(folder, model_folders["teacher"], corpus[:30], mapping=mapping)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(data))
    run_command("precompute", recipe)
    root = folder / "caches"
    (path,) = (root / "stores").iterdir()
    store = open_store(str(path))
    manifest = Manifest(store)
    columns = {}
    for name in list_selections(store):
        shards = set(read_selection(store, name).shard_names)
        columns[name] = [column for column in manifest.columns() if shards <= set(manifest.shards(column))]
    return Place(root, recipe, files_below(root), columns, read_all(store, columns))


def read_all(store: Store, columns: dict[str, list[str]]) -> dict[str, Any]:
    """Read every row of every selection in all columns, and the output head."""
    values: dict[str, Any] = {}
    for name, of_selection in columns.items():
        selection = read_selection(store, name)
        rows = Reader(store, selection, of_selection).rows(range(len(selection)))
        values[name] = [list(selection.spans), dict(selection.provenance), rows]
    values[HEAD] = read_constants(store, HEAD)[0]
    return values


def readings(place: Place) -> dict[str, Callable[[], Any]]:
    """Give what can be read of a root: the rows of each selection, the output head, and what leads there."""
    from coldstill.pipeline.outputs.run_index import find_run_rows
    from coldstill.pipeline.recipe.file import load_recipe
    from coldstill.pipeline.students.folders import find_student

    recipe = load_recipe(place.recipe)
    path = str(place.store)
    found: dict[str, Callable[[], Any]] = {
        name: lambda name=name: read_all_of(open_store(path), name, place.columns[name]) for name in place.columns
    }
    found[HEAD] = lambda: read_constants(open_store(path), HEAD)[0]
    found["index"] = lambda: {split: chosen.name for split, chosen in find_run_rows(recipe).selections.items()}
    found["student"] = lambda: {
        file.name: file.read_bytes() for file in find_student(recipe).iterdir() if file.name != "checksums.json"
    }
    return found


def read_all_of(store: Store, name: str, columns: Sequence[str]) -> list[Any]:
    selection = read_selection(store, name)
    rows = Reader(store, selection, columns).rows(range(len(selection)))
    return [list(selection.spans), dict(selection.provenance), rows]


def problems_of(audit: RootAudit) -> list[Any]:
    return [*audit.problems, *(problem for store in audit.stores for problem in store.problems)]


def unnoticed(place: Place, damage: Damage) -> str | None:
    """Say what an audit of a damaged root fails to tell."""
    audit = verify(str(place.root), show_progress=False)
    if is_harmless(damage):
        return None if audit.is_clean else f"harmless, but {problems_of(audit)}"
    if audit.is_clean:
        return None if is_unread(place.store, damage) else "is clean"
    parts = damage.file.split("/")
    if parts[3:4] != ["shards"] or len(parts) < 6:
        return None
    # A column's arrays and metadata, or the group of a folder above several columns: then any of them is named.
    shard, folder = parts[4], "/".join(parts[5:-1])
    said = [problem.what for problem in problems_of(audit)]
    of_file = {name for names in place.columns.values() for name in names if f"{folder}/".startswith(f"{name}/")}
    wanted = [f"column {name}," for name in of_file] or ["column "]
    if any(f"shard {shard}" in what and any(words in what for words in wanted) for what in said):
        return None
    return f"names neither column nor shard: {said}"


def report(found: dict[Damage, str]) -> str:
    lines = [f"{damage}: {what}" for damage, what in found.items()]
    return f"{len(lines)} of {NUM_DAMAGES}:\n" + "\n".join(lines)


def test_the_root_has_a_file_of_each_kind_and_reads_right(place: Place):
    kinds = {kind_of(file) for file in place.files}
    assert {
        "root metadata", "commits", "rows", "selections", "index of rows", "index of student", "constant object",
        "shard object", "student's model.safetensors", "student's checksums.json", "student's config.json",
    } <= kinds  # fmt: skip
    assert verify(str(place.root), show_progress=False).is_clean
    assert {kind_of(damage.file) for damage in place.damages()} >= {"commits", "selections", "rows", "shard object"}
    shards = {file.split("/")[4] for file in place.files if "/shards/" in file and len(file.split("/")) > 6}
    assert len(shards) == 3


def test_no_damage_escapes_verify(place: Place):
    found = {}
    for damage in place.damages():
        with place.damaged(damage):
            if what := unnoticed(place, damage):
                found[damage] = what
    assert not found, report(found)


def test_no_damage_gives_a_wrong_number_or_a_raw_error(place: Place):
    read = readings(place)
    right = {name: give() for name, give in read.items()}
    for name in (*place.columns, HEAD):
        np.testing.assert_equal(right[name], place.values[name])
    found = {}
    num_refused = 0
    for damage in place.damages():
        with place.damaged(damage):
            for name, give in read.items():
                try:
                    np.testing.assert_equal(give(), right[name])
                except StoreError as error:
                    num_refused += 1
                    if "\n" in str(error):
                        found[damage] = f"more than one line: {error}"
                except AssertionError:
                    found[damage] = f"{name} is read as other values"
                except Exception as error:
                    found[damage] = f"{name}: {type(error).__name__}: {error}"
    assert not found, report(found)
    assert num_refused > NUM_DAMAGES // 4


def unmended(place: Place, damage: Damage) -> str | None:
    """Damage the root, repair it, and say what is not as it was; the root is then as it was in any case."""
    try:
        damage.apply(place.root)
        if is_unread(place.store, damage):
            return None
        run_command("cache", "repair", place.recipe)
        audit = verify(str(place.root), show_progress=False)
        left = difference(lasting(files_below(place.root)), lasting(place.files))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    except AssertionError as error:
        return str(error)
    finally:
        place.restore()
    return None if audit.is_clean and not left else f"{problems_of(audit)}, {left}"


def damages_of_each_kind(place: Place) -> list[Damage]:
    """Give a flip and a deletion for one file of each kind."""
    of_kind = {kind_of(file): file for file in place.guarded()}
    return [Damage(file, way, seed) for seed, file in enumerate(of_kind.values()) for way in ("flip", "delete")]


def test_repair_restores_every_kind_of_file(place: Place):
    found = {damage: what for damage in damages_of_each_kind(place) if (what := unmended(place, damage))}
    assert not found, report(found)


@pytest.mark.parametrize(("old", "new"), [("group", "grouq"), ('"format": 3', '"format": 4')], ids=["node", "format"])
def test_repair_restores_root_metadata_outside_of_what_its_check_covers(place: Place, old: str, new: str):
    path = place.store / "arrays.zarr/zarr.json"
    try:
        path.write_text(path.read_text().replace(old, new))
        assert not verify(str(place.root), show_progress=False).is_clean
        run_command("cache", "repair", place.recipe)
        assert difference(lasting(files_below(place.root)), lasting(place.files)) == {}
    finally:
        place.restore()


@pytest.mark.slow
def test_repair_restores_every_damaged_file(place: Place):
    found = {damage: what for damage in place.damages() if (what := unmended(place, damage))}
    assert not found, report(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["root metadata", "index of rows", "index of student"])
def test_no_flipped_byte_of_a_file_escapes_verify_or_is_read_wrong(place: Place, kind: str):
    """Flip every byte of the files that are not named by the checksum of all of their bytes.

    Of a selection the content has a checksum, not the bytes: what Parquet does not read may change.
    """
    file = next(file for file in place.files if kind_of(file) == kind)
    path, good = place.root / file, place.files[file]
    read = readings(place)
    right = {name: give() for name, give in read.items()}
    concerned = {"index of rows": ["index"], "index of student": ["student"]}.get(kind, list(place.columns))
    unseen = []
    for index in range(len(good)):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1 << index % 8]) + good[index + 1 :])
        if verify(str(place.root), show_progress=False).is_clean:
            unseen.append(index)
        for name in concerned:
            with contextlib.suppress(StoreError):
                np.testing.assert_equal(read[name](), right[name])
    path.write_bytes(good)
    shown = ", ".join(f"{index} {good[max(index - 12, 0) : index + 4]!r}" for index in unseen[:20])
    assert not unseen, f"{len(unseen)} of {len(good)} flips leave the root clean: {shown}"
