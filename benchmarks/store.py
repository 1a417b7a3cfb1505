"""The store against the bare codec, side by side in one run, one thread each; and a store of a million rows.

The bare arm is the least that any store must do: the same zstd chunks in one plain file, read by offset and decoded
with numcodecs in a loop; for writing, encoded in a loop, appended and synced once a shard. The store's arm does what
its users' code does: `write_column`, and `Reader.rows` in batches of 8. Both arms read from a warm page cache. A
shuffled read of rows is held against the bare codec's sequential read.

    python benchmarks/store.py [--folder FOLDER] [--shards 12] [--million 1000000]

Rows are read by one, two and four threads of one reader, too: they decode beside each other.

The last line is one JSON object: `reader_tokens_per_s` by the number of threads; ratios of throughput in row bytes (1
is as fast as the bare codec), seconds to open a store of a million rows in 16,000 shards, and how much longer its first
read of a row takes than that of a store of 1,000 rows. First read means that neither the row's shard nor its chunks
were touched by that reader before.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from tqdm import tqdm

from coldstill.cache.array_object import ZSTD_LEVEL
from coldstill.cache.columns import ArraySpec, Column
from coldstill.cache.identity import row_id
from coldstill.cache.laying import lay_rows, places_of_rows, wanted_rows
from coldstill.cache.manifest import Manifest
from coldstill.cache.reader import Reader
from coldstill.cache.rows import publish_rows, read_lines, read_rows, split_shards
from coldstill.cache.selections import Selection, read_selection, write_selection
from coldstill.cache.store import Store, create_store, open_store
from coldstill.cache.tokens import TOKENS, write_tokens
from coldstill.cache.writer import write_column

ROW_TOKENS = 512
SHARD_TOKENS = 32_768
BATCH_ROWS = 8
VOCAB_SIZE = 49_152
WIDTH = 576
REPEATS = 5
NUM_SHARDS_OF_A_MILLION = 16_000
COLD_READS = 400
THREADS = (1, 2, 4)

HIDDEN = Column(
    "hidden/12/int8",
    {
        "values": ArraySpec("int8", (WIDTH,)),
        "scale": ArraySpec("float32"),
        "centre": ArraySpec("float32", (WIDTH,), axis="shard"),
        "spread": ArraySpec("float32", (WIDTH,), axis="shard"),
    },
)
TOPK = Column(
    "logits/topk/64/float16",
    {"ids": ArraySpec("uint16", (64,)), "offsets": ArraySpec("float16", (64,)), "maximum": ArraySpec("float32")},
)
LOGSUMEXP = Column("logsumexp/2", {"values": ArraySpec("float32")})
COLUMNS = (HIDDEN, TOPK, LOGSUMEXP)


@dataclass(frozen=True)
class Shard:
    """What is written of one shard, by column, with its rows."""

    rows: list[np.ndarray]
    arrays: dict[str, dict[str, np.ndarray]]


def make_shard(seed: int) -> Shard:
    """Make numbers that compress as a teacher's do: near-normal int8 states, falling logits, frequent token ids."""
    generator = np.random.default_rng(seed)
    ids = np.minimum(generator.zipf(1.3, SHARD_TOKENS), VOCAB_SIZE - 1).astype(np.uint16)
    offsets = -np.sort(generator.gamma(2.0, 1.5, (SHARD_TOKENS, 64)), axis=1).astype(np.float16)
    arrays = {
        HIDDEN.name: {
            "values": (generator.standard_normal((SHARD_TOKENS, WIDTH)) * 28).clip(-127, 127).astype(np.int8),
            "scale": generator.random(SHARD_TOKENS, np.float32),
            "centre": generator.random(WIDTH, np.float32),
            "spread": generator.random(WIDTH, np.float32),
        },
        TOPK.name: {
            "ids": np.minimum(generator.zipf(1.2, (SHARD_TOKENS, 64)), VOCAB_SIZE - 1).astype(np.uint16),
            "offsets": offsets,
            "maximum": generator.random(SHARD_TOKENS, np.float32),
        },
        LOGSUMEXP.name: {"values": generator.random(SHARD_TOKENS, np.float32)},
    }
    return Shard(np.split(ids, SHARD_TOKENS // ROW_TOKENS), arrays)


def register(store: Store, rows: list[np.ndarray]) -> Selection:
    """Lay rows into shards, commit their tokens and select them."""
    manifest = Manifest(store)
    wanted = wanted_rows([row_id(row) for row in rows], [len(row) for row in rows])
    known = list(read_lines(store).values())
    laid = lay_rows(known, manifest.shards(TOKENS), wanted)
    write_tokens(store, manifest, laid, lambda indices: [rows[index] for index in indices], vocab_size=VOCAB_SIZE)
    publish_rows(store, laid.rows)
    found = places_of_rows(store, [*known, laid.rows], manifest.shards(TOKENS), wanted)
    return write_selection(store, found, [()] * len(rows), {})


class BareFile:
    """The same chunks as the store's, one behind the other in a plain file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chunks: list[tuple[int, int, np.dtype]] = []
        self._offset = 0

    def write(self, arrays: dict[str, dict[str, np.ndarray]]) -> None:
        """Encode a shard's chunks, append them, and let them reach the disk."""
        codec = Zstd(level=ZSTD_LEVEL)
        with self.path.open("ab") as file:
            for column in COLUMNS:
                for name, spec in column.arrays.items():
                    values = arrays[column.name][name]
                    length = spec.chunk_length(len(values))
                    for start in range(0, len(values), length):
                        data = codec.encode(values[start : start + length])
                        file.write(data)
                        self.chunks.append((self._offset, len(data), values.dtype))
                        self._offset += len(data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, order: np.ndarray) -> int:
        """Decode chunks in an order, and give their bytes."""
        codec = Zstd()
        num_bytes = 0
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for number in order:
                offset, length, dtype = self.chunks[number]
                num_bytes += np.frombuffer(codec.decode(os.pread(descriptor, length, offset)), dtype).nbytes
        finally:
            os.close(descriptor)
        return num_bytes


def write_shard(store: Store, manifest: Manifest, name: str, shard: Shard) -> None:
    for column in COLUMNS:
        write_column(
            store,
            manifest,
            name,
            column,
            shard.arrays[column.name],
            num_tokens=SHARD_TOKENS,
            num_rows=len(shard.rows),
        )


def read_rows_in(store: Store, selection: Selection, order: np.ndarray) -> int:
    """Read rows in an order through a new reader, and give the bytes of what it gave."""
    reader = Reader(store, selection, [column.name for column in COLUMNS])
    num_bytes = 0
    for start in range(0, len(order), BATCH_ROWS):
        for row in reader.rows(order[start : start + BATCH_ROWS].tolist()):
            num_bytes += sum(
                values.nbytes
                for name, arrays in row.items()
                for array, values in arrays.items()
                if is_of_tokens(name, array)
            )
    return num_bytes


def read_by_threads(store: Store, selection: Selection, order: np.ndarray, num_threads: int) -> int:
    """Read rows in an order by threads that share a reader, and give their tokens."""
    reader = Reader(store, selection, [column.name for column in COLUMNS])
    batches = [order[start : start + BATCH_ROWS].tolist() for start in range(0, len(order), BATCH_ROWS)]
    with ThreadPoolExecutor(num_threads) as pool:
        return sum(len(rows) for rows in pool.map(reader.rows, batches)) * ROW_TOKENS


def is_of_tokens(column: str, array: str) -> bool:
    """Whether an array counts: what holds for a whole shard comes with each row, but is no row bytes."""
    specs = {each.name: each.arrays for each in COLUMNS}
    return specs[column][array].axis == "token"


def throughput(work: Callable[[], int]) -> float:
    started = time.perf_counter()
    num_bytes = work()
    return num_bytes / (time.perf_counter() - started)


def compare_threads(store: Store, selection: Selection) -> dict[int, int]:
    """Read all rows, shuffled, by one thread and by several in turn, and give the medians of tokens a second."""
    generator = np.random.default_rng(2)
    speeds: dict[int, list[float]] = {number: [] for number in THREADS}
    for _ in range(REPEATS):
        order = generator.permutation(len(selection))
        for number, of_number in speeds.items():
            of_number.append(throughput(functools.partial(read_by_threads, store, selection, order, number)))
    medians = {number: round(statistics.median(of_number)) for number, of_number in speeds.items()}
    print("tokens/s by threads:", ", ".join(f"{number}: {speed:,}" for number, speed in medians.items()))
    return medians


def compare_codec(folder: Path, num_shards: int) -> dict[str, Any]:
    """Write and read both arms in turn, and give the ratio of their medians."""
    shards = [make_shard(seed) for seed in range(num_shards)]
    speeds: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        place = folder / f"round-{repeat}"
        place.mkdir()
        store, selection, bare = write_both(place, shards, speeds)
        if repeat < REPEATS - 1:
            shutil.rmtree(place)
    generator = np.random.default_rng(0)
    rows, chunks = np.arange(len(selection)), np.arange(len(bare.chunks))
    read_rows_in(store, selection, rows)
    bare.read(chunks)
    for _ in range(REPEATS):
        shuffled_rows, shuffled_chunks = generator.permutation(rows), generator.permutation(chunks)
        arms = {
            "bare sequential": lambda: bare.read(chunks),
            "sequential": lambda: read_rows_in(store, selection, rows),
            "bare shuffled": lambda order=shuffled_chunks: bare.read(order),
            "shuffled": lambda order=shuffled_rows: read_rows_in(store, selection, order),
        }
        for arm, work in arms.items():
            speeds.setdefault(arm, []).append(throughput(work))
    medians = {arm: statistics.median(values) for arm, values in speeds.items()}
    for arm, speed in medians.items():
        spread = f"{min(speeds[arm]) / 1e6:.0f} to {max(speeds[arm]) / 1e6:.0f}"
        print(f"{arm:16} {speed / 1e6:7.0f} MB/s  ({spread})")
    return {
        "reader_tokens_per_s": compare_threads(store, selection),
        "sequential_read_over_codec": medians["sequential"] / medians["bare sequential"],
        "shuffled_read_over_codec": medians["shuffled"] / medians["bare sequential"],
        "write_over_codec": medians["write"] / medians["bare write"],
    }


def write_both(folder: Path, shards: list[Shard], speeds: dict[str, list[float]]) -> tuple[Store, Selection, BareFile]:
    """Write both arms, shard by shard in turn, and note their speeds."""
    teacher = {"identity": {"weights": "w", "config": "c", "dtype": "float32"}}
    store = create_store(str(folder / "root"), teacher)
    selection = register(store, [row for shard in shards for row in shard.rows])
    manifest = Manifest(store)
    bare = BareFile(folder / "bare")
    seconds = {"write": 0.0, "bare write": 0.0}
    for name, shard in zip(selection.shard_names, shards, strict=True):
        seconds["bare write"] += timed(functools.partial(bare.write, shard.arrays))
        seconds["write"] += timed(functools.partial(write_shard, store, manifest, name, shard))
    num_bytes = sum(values.nbytes for shard in shards for arrays in shard.arrays.values() for values in arrays.values())
    for arm, total in seconds.items():
        speeds.setdefault(arm, []).append(num_bytes / total)
    return store, selection, bare


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make_short_rows(num_rows: int) -> Iterator[np.ndarray]:
    for number in range(num_rows):
        yield np.array([number & 0xFFFF, number >> 16, 7, number % 11], np.uint32)


def write_large(root: Path, num_rows: int, num_shards: int) -> tuple[Store, str]:
    """Write a store of many short rows in many shards, every column really committed."""
    import coldstill.cache.laying

    coldstill.cache.laying.SHARD_TOKENS = 4 * -(-num_rows // num_shards)
    store = create_store(str(root), {"identity": {"weights": str(num_rows), "config": "c", "dtype": "float32"}})
    selection = register(store, list(make_short_rows(num_rows)))
    manifest = Manifest(store)
    shards = split_shards(read_rows(store))
    for name, rows in tqdm(shards.items(), desc=f"{num_rows:,} rows", unit="shard"):
        num_tokens = 4 * len(rows)
        values = {"values": np.arange(num_tokens, dtype=np.float32)}
        write_column(store, manifest, name, LOGSUMEXP, values, num_tokens=num_tokens, num_rows=len(rows))
    manifest.compact()
    return store, selection.name


def open_reader(path: str, selection: str) -> Reader:
    store = open_store(path)
    return Reader(store, read_selection(store, selection), [TOKENS, LOGSUMEXP.name])


def first_read_s(path: str, selection: str) -> float:
    """Give the median time of reading a row from a shard that the reader has not touched."""
    generator = np.random.default_rng(1)
    seconds: list[float] = []
    while len(seconds) < COLD_READS:
        reader = open_reader(path, selection)
        numbers = reader.selection.shard_numbers
        firsts = np.searchsorted(numbers, np.arange(len(reader.selection.shard_names)))
        chosen = generator.permutation(firsts)[:COLD_READS]
        reader.row(int(chosen[0]))
        seconds += [timed(lambda index=int(index), reader=reader: reader.row(index)) for index in chosen[1:]]
    return statistics.median(seconds[:COLD_READS])


def compare_sizes(folder: Path, num_rows: int) -> dict[str, float]:
    num_shards = max(round(num_rows * NUM_SHARDS_OF_A_MILLION / 1_000_000), 1)
    large, large_selection = write_large(folder / "large", num_rows, num_shards)
    small, small_selection = write_large(folder / "small", 1000, max(round(num_shards * 1000 / num_rows), 1))
    opened = [timed(lambda: open_reader(large.path, large_selection)) for _ in range(REPEATS)]
    reads = {"large": [], "small": []}
    first_read_s(large.path, large_selection)
    for _ in range(REPEATS):
        reads["large"].append(first_read_s(large.path, large_selection))
        reads["small"].append(first_read_s(small.path, small_selection))
    medians = {arm: statistics.median(values) for arm, values in reads.items()}
    print(f"open {num_rows:,} rows in {num_shards:,} shards: {statistics.median(opened):.2f} s")
    print(f"first read of a row: {medians['large'] * 1e6:.0f} us, of 1,000 rows {medians['small'] * 1e6:.0f} us")
    return {
        "open_s_at_1m_rows": statistics.median(opened),
        "row_read_1m_over_1k": medians["large"] / medians["small"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--shards", type=int, default=12, help="shards of 32,768 tokens to compare the codec on")
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of the large store")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="store-", dir=arguments.folder))
    try:
        result = compare_codec(folder, arguments.shards) | compare_sizes(folder, arguments.million)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}))


if __name__ == "__main__":
    main()
