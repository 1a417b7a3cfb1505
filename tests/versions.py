"""Which tests need a later transformers than the oldest one that Coldstill runs on."""

import pytest
import transformers
from packaging.version import Version


def since(release: str) -> pytest.MarkDecorator:
    """Leave a test out where an earlier transformers is installed."""
    return pytest.mark.skipif(
        Version(transformers.__version__) < Version(release), reason=f"transformers has it, and right, since {release}"
    )
