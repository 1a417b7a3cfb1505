"""A local read-through copy of remote arrays: fetched whole when first read, then read from the local disk.

Copies are named by the sha256 that the commit record gives, so one that is there is never stale, and several readers,
stores and roots can share a folder. Nothing is evicted: the folder may be removed at any time.
"""

import hashlib
from dataclasses import dataclass

from coldstill.cache.local_objects import LocalObjects
from coldstill.cache.objects import Objects


@dataclass(frozen=True)
class StoredObject:
    """One object as its commit record describes it.

    Attributes:
        name: Within the store.
        num_bytes: Its size.
        sha256: Of all of it, in hexadecimal.
    """

    name: str
    num_bytes: int
    sha256: str


class LocalCopy:
    """Copies of objects in a local folder.

    Args:
        folder: Where the copies lie.
        source: Where the objects come from.
    """

    def __init__(self, folder: str, source: Objects) -> None:
        self.objects = LocalObjects(folder)
        self._source = source

    def fetch(self, stored: StoredObject) -> str:
        """Copy an object, where it was not yet, and return its name among the copies.

        Raises:
            FileNotFoundError: The source does not have it.
            ValueError: It is not what its commit record says.
        """
        name = f"{stored.sha256[:2]}/{stored.sha256}"
        if self.objects.size(name) != stored.num_bytes:
            data = self._source.read(stored.name)
            if hashlib.sha256(data).hexdigest() != stored.sha256:
                raise ValueError("its object is not what was written")
            self.objects.write(name, data)
        return name
