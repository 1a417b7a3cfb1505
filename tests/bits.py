"""Damage to files: one bit, somewhere."""

from pathlib import Path


def flip(path: Path, index: int = 20) -> None:
    """Turn one bit of a file's byte."""
    data = path.read_bytes()
    path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
