"""Which tests need a later transformers than the oldest one that Coldstill runs on."""

import pytest
import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)


def since(release: str) -> pytest.MarkDecorator:
    """Leave a test out where an earlier transformers is installed."""
    return pytest.mark.skipif(Version(release) > INSTALLED, reason=f"transformers has it, and right, since {release}")
