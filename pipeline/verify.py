"""Verify a root: read every byte of its stores, its index and its pruned students. Loads no model, and no torch."""

from coldstill.cache.root_audit import RootAudit, audit_root
from coldstill.pipeline.outputs.run_index import KEPT_FOLDERS


def verify(root: str, *, show_progress: bool = True) -> RootAudit:
    """Read every byte below a root, what recipes name as `cache`, and hold it against its checksum.

    Raises:
        StoreNotFoundError: The root holds nothing of Coldstill's.
        RemoteError: Object storage does not answer.
    """
    return audit_root(root, kept=KEPT_FOLDERS, show_progress=show_progress)
