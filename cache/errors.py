"""What may be wrong with a store, and the root of every error that Coldstill raises for its user's sake.

The whole tree, with the errors of recipes, texts and models, is drawn in `coldstill.pipeline.runtime.errors`.
"""


class ColdstillError(Exception):
    """The root of the tree: catch this to catch everything that is the user's to mend."""


class StoreError(ColdstillError, OSError):
    """Something about a store on disk."""


class StoreNotFoundError(StoreError):
    """No store or selection where one is needed, or no folder that is kept beside the stores."""


class FormatError(StoreError):
    """The store was written by a version of the format that this version does not read."""


class IdentityError(StoreError):
    """The store belongs to another teacher than the one at hand."""


class IncompleteError(StoreError):
    """Columns that a run needs are not committed for all of its shards."""


class CorruptError(StoreError):
    """Stored bytes are not the bytes that were committed."""


class InUseError(StoreError):
    """Another living process writes the same shards."""


class RemoteError(StoreError):
    """A request to object storage failed, and failed again."""


class NoRoomError(StoreError):
    """A run would write more than its disk has room for."""
