"""The sizes of the models that tests use, and the text that they read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCAB_SIZE = 384
TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# What makes a student of it.
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_data(folder: Path, text: Sequence[str], *, train_rows: int = 20, eval_rows: int = 6) -> dict[str, Any]:
    """Write a text into a folder, and give a recipe's data section over it: packed rows of 24 tokens."""
    file = folder / "text.txt"
    file.write_text("\n".join(text))
    source = {"path": "text", "data_files": str(file)}
    return {
        "sequence_length": 24,
        "train": {**source, "max_rows": train_rows},
        "eval": {**source, "max_rows": eval_rows},
    }
