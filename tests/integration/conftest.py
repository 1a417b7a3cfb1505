"""A hub of the test's own, served over HTTP where the hub's client looks for it."""

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import TOKEN, Hub
from huggingface_hub import constants
from werkzeug.serving import make_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, with somebody logged in who may write; large files go its plain way, not through the Xet store."""
    served = Hub()
    server = make_server("127.0.0.1", 0, served.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    try:
        with warnings.catch_warnings():
            # How the hub's client sends a large file, httpx calls deprecated.
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
            yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
