"""Whether teacher and student speak of the same tokens."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from cache.errors import ModelError
from pipeline.models.loading import text_config


def check_vocabularies(teacher: PreTrainedConfig | int, student: PreTrainedConfig) -> None:
    """Refuse a student whose logits are not over the teacher's vocabulary.

    Raises:
        ModelError: The numbers of entries differ.
    """
    teacher_size = teacher if isinstance(teacher, int) else text_config(teacher).vocab_size
    student_size = text_config(student).vocab_size
    if teacher_size != student_size:
        raise ModelError(
            f"teacher and student have different vocabularies: {teacher_size} entries against {student_size}; "
            "distillation of logits needs one vocabulary: use a student of the teacher's family and padding"
        )


def check_tokenizers(teacher_folder: Path, student_folder: Path) -> None:
    """Refuse a student whose tokenizer gives tokens other numbers than the teacher's; absent ones are not compared.

    Raises:
        ModelError: The two vocabularies assign different ids.
    """
    vocabularies = [_vocabulary(folder) for folder in (teacher_folder, student_folder)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"teacher and student have different vocabularies: the tokenizers in {teacher_folder} and {student_folder} "
            "give tokens different ids"
        )


def _vocabulary(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab")
