"""Columns written by a thread of its own, while the teacher computes the next shard."""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from coldstill.cache.columns import Column
from coldstill.cache.manifest import Manifest
from coldstill.cache.store import Store
from coldstill.cache.writer import write_column


class WriteBehind:
    """Writes and commits columns in the order in which they are given, one behind another.

    A context: leaving it waits for all that was given; leaving it by an exception drops what was not begun. What a
    write raises is raised by the next call.

    Args:
        store: Where to write.
        manifest: Its manifest.
        on_written: Called with the bytes of each column once it is committed.
    """

    def __init__(self, store: Store, manifest: Manifest, on_written: Callable[[int], None]) -> None:
        self._store = store
        self._manifest = manifest
        self._on_written = on_written
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coldstill-write")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def write(
        self, shard: str, column: Column, arrays: Mapping[str, np.ndarray], *, num_tokens: int, num_rows: int
    ) -> None:
        """Hand a column over; it is not to be changed any more.

        Raises:
            OSError: An earlier column could not be written.
        """
        self._raise_failures()
        self._pending.append(
            self._thread.submit(self._write, shard, column, arrays, num_tokens=num_tokens, num_rows=num_rows)
        )

    def flush(self) -> None:
        """Wait until all that was handed over is committed.

        Raises:
            OSError: A column could not be written.
        """
        while self._pending:
            self._pending.popleft().result()

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _write(
        self, shard: str, column: Column, arrays: Mapping[str, np.ndarray], *, num_tokens: int, num_rows: int
    ) -> None:
        record = write_column(
            self._store, self._manifest, shard, column, arrays, num_tokens=num_tokens, num_rows=num_rows
        )
        self._on_written(record.stored_bytes)
