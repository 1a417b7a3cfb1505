"""Byte objects below an fsspec URL, whose single writes are atomic, as they are on object storage.

A request that fails for a reason that may pass is made again with growing pauses; then the error says so in one line.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import IO, Any, TypeVar

import tenacity

from coldstill.cache.errors import RemoteError

_ATTEMPTS = 7
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
_CONCURRENT_WRITES = 8
# What is as large goes over in parts, from the file in which it lies.
LARGE_BYTES = 64 << 20

# Who makes requests again is decided here: attempts of several layers would multiply to minutes.
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}}

# What another attempt cannot change.
_LASTING_ERRORS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    ValueError,
    TypeError,
)

Result = TypeVar("Result")


class RemoteObjects:
    """Objects at an fsspec URL; see `coldstill.cache.objects.Objects`."""

    def __init__(self, root: str) -> None:
        import fsspec

        self.root = root.rstrip("/")
        # A cached listing would hide what another machine wrote a moment ago.
        options = _OPTIONS.get(self.root.partition("://")[0], {})
        try:
            filesystem, path = fsspec.core.url_to_fs(self.root, use_listings_cache=False, **options)
        except ImportError as error:
            extra = "; run: pip install 'coldstill[s3]'" if self.root.startswith("s3://") else ""
            raise RemoteError(f"{self.root} needs a library that is not installed: {error}{extra}") from None
        except Exception as error:  # whatever a file system of another library finds wrong with a URL
            raise RemoteError(f"{self.root} cannot be opened: {_in_a_line(error)}") from None
        self._filesystem: Any = filesystem
        self._base = path.rstrip("/")

    def read(self, name: str) -> bytes:
        return bytes(self._try("read", name, lambda: self._filesystem.cat_file(self._path(name))))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        paths = [self._path(name) for name, _, _ in ranges]
        starts = [start for _, start, _ in ranges]
        ends = [start + num_bytes for _, start, num_bytes in ranges]
        # All at once; what fails is asked for again by itself.
        parts = self._filesystem.cat_ranges(paths, starts, ends, on_error="return")
        return [
            self._read_range(*wanted) if isinstance(part, Exception) else bytes(part)
            for wanted, part in zip(ranges, parts, strict=True)
        ]

    def write(self, name: str, data: bytes) -> None:
        self._try("write", name, lambda: self._filesystem.pipe_file(self._path(name), data))

    def write_file(self, name: str, file: IO[bytes]) -> None:
        data = file.read(LARGE_BYTES)
        if len(data) < LARGE_BYTES:
            self.write(name, data)
            return

        def put() -> None:
            file.seek(0)
            self._filesystem.put_file(f"/dev/fd/{file.fileno()}", self._path(name))

        # It is there once its last part is.
        self._try("write", name, put)

    def write_all(self, objects: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(_CONCURRENT_WRITES) as pool:
            list(pool.map(self.write, objects.keys(), objects.values()))

    def exists(self, name: str) -> bool:
        # Not `isfile`, which takes any error for an answer.
        try:
            return bool(self._try("find", name, lambda: self._filesystem.info(self._path(name)))["type"] == "file")
        except FileNotFoundError:
            return False

    def files(self, folder: str) -> list[str]:
        return self._names(folder, "file")

    def folders(self, folder: str) -> list[str]:
        return self._names(folder, "directory")

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            found = self._try("list", folder, lambda: self._filesystem.find(self._path(folder), detail=True))
        except FileNotFoundError:
            return {}
        start = len(self._path("").lstrip("/"))
        return {path.lstrip("/")[start:]: int(entry["size"]) for path, entry in sorted(found.items())}

    def modified(self, name: str) -> datetime | None:
        try:
            written: datetime = self._try("find", name, lambda: self._filesystem.modified(self._path(name)))
        except (FileNotFoundError, RemoteError):
            return None
        return written

    def free_bytes(self) -> int | None:
        return None

    def remove(self, name: str) -> None:
        # What is gone is gone, by another process or by an earlier attempt whose answer was lost.
        with contextlib.suppress(FileNotFoundError):
            if self.exists(name):
                self._try("remove", name, lambda: self._filesystem.rm_file(self._path(name)))

    def remove_folder(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.sizes(folder):
                self._try("remove", folder, lambda: self._filesystem.rm(self._path(folder), recursive=True))

    def sweep(self, *, is_alone: bool) -> int:
        return 0  # a write that was cut off leaves nothing here

    def _read_range(self, name: str, start: int, num_bytes: int) -> bytes:
        def read() -> bytes:
            if start >= self._filesystem.size(self._path(name)):
                return b""  # object storage calls such a range invalid, a file system gives nothing
            return bytes(self._filesystem.cat_file(self._path(name), start=start, end=start + num_bytes))

        return self._try("read", name, read)

    def _names(self, folder: str, kind: str) -> list[str]:
        def entries() -> Any:
            try:
                return self._filesystem.ls(self._path(folder).rstrip("/"), detail=True)
            except FileNotFoundError:
                return []

        listed = self._try("list", folder, entries)
        names = {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in listed if entry["type"] == kind}
        return sorted(names)

    def _try(self, what: str, name: str, attempt: Callable[[], Result]) -> Result:
        """Make a request until it succeeds or its error is one that lasts.

        Raises:
            RemoteError: It failed as often as it is tried.
            FileNotFoundError: There is no such object; for a write, no such bucket.
        """
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
            retry=tenacity.retry_if_not_exception_type((*_LASTING_ERRORS, KeyboardInterrupt, SystemExit)),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except FileNotFoundError as error:
            if what == "write":
                raise RemoteError(f"{self.root}/{name} cannot be written: no such bucket ({error})") from None
            error.filename = name
            raise
        except _LASTING_ERRORS as error:
            raise RemoteError(f"{self.root}/{name}: cannot {what}: {_in_a_line(error)}") from None
        except Exception as error:
            raise RemoteError(
                f"{self.root}/{name}: cannot {what} after {_ATTEMPTS} attempts: {_in_a_line(error)}; "
                "what was committed stays; run the command again to go on"
            ) from None

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
