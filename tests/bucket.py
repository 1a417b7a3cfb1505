"""A bucket of the test's own: moto's S3 in a process, over HTTP."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import boto3

REGION = "us-east-1"


class Endpoint:
    """An S3 endpoint with a bucket for each test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = boto3.client(
            "s3", endpoint_url=url, region_name=REGION, aws_access_key_id="test", aws_secret_access_key="test"
        )

    def make_bucket(self) -> str:
        name = f"bucket-{uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def names(self, bucket: str, prefix: str = "caches/") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"].removeprefix("caches/") for page in pages for entry in page.get("Contents", [])]

    def read(self, bucket: str, name: str) -> bytes:
        with self.client.get_object(Bucket=bucket, Key=f"caches/{name}")["Body"] as body:
            return body.read()

    def write(self, bucket: str, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=f"caches/{name}", Body=data)

    def remove(self, bucket: str, name: str) -> None:
        self.client.delete_object(Bucket=bucket, Key=f"caches/{name}")

    def tree(self, bucket: str) -> dict[str, bytes]:
        """Give every object of the stores and the index."""
        return {name: self.read(bucket, name) for name in self.names(bucket) if not name.startswith("students/")}


@contextlib.contextmanager
def serving_buckets() -> Iterator[Endpoint]:
    """Start moto's S3 in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                    break
            except urllib.error.URLError:
                assert server.poll() is None, "moto's server ended"
                time.sleep(0.05)
        started = Endpoint(url)
        yield started
        started.client.close()
        server.kill()


def environment(url: str, home: Path) -> dict[str, str]:
    """Say what lets s3fs speak to an endpoint, and keep copies in a folder."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        # One attempt below Coldstill's own: what botocore repeats takes seconds and hides what is tested here.
        "AWS_MAX_ATTEMPTS": "1",
        "XDG_CACHE_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }
