"""Whether teacher and student speak of the same tokens."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from coldstill.pipeline.models.loading import load_tokenizer, text_config
from coldstill.pipeline.runtime.errors import ModelError

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken")
# What tokenizers of one vocabulary may do in different ways: case, digits, white space, accents, scripts, code.
_PROBES = (
    "The Quick brown fox DOESN'T jump over 1234567 lazy dogs, 3.14 times.",
    "  two  spaces,\ta tab\nand a line\n\n  more.",
    "na\u00efve cafe\u0301 \u212b \u00df \u4f60\u597d \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600",
    "def f(x): return {'a': x[0] ** 2 != 1_000}  # see https://a.b/c?d=e",
)


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


def check_tokenizers(teacher: Any, student_folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a student whose tokenizer gives tokens or texts other ids than the teacher's; an absent one says nothing.

    Tokens that were added are compared with all others, and both are asked for the ids of a few texts. A token that
    only one of them has does not matter, unless its id is another token's.

    Args:
        teacher: The teacher's tokenizer.
        student_folder: Where the student and its tokenizer are.
        trust_remote_code: Whether the student's may run code of its own.

    Raises:
        ModelError: They differ, or the student's cannot be loaded.
    """
    if not any(file.is_file() for pattern in _TOKENIZER_FILES for file in student_folder.glob(pattern)):
        return
    student = load_tokenizer(student_folder, trust_remote_code=trust_remote_code)
    if difference := _difference(teacher, student):
        raise ModelError(
            f"teacher and student have different vocabularies: the tokenizers in {teacher.name_or_path} and "
            f"{student_folder} {difference}; use a student of the teacher's family"
        )


def _difference(teacher: Any, student: Any) -> str | None:
    """Say the first thing that two tokenizers do in different ways; None where they agree."""
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    by_id = {index: token for token, index in student_ids.items()}
    for token, index in sorted(teacher_ids.items(), key=lambda entry: entry[1]):
        if student_ids.get(token, index) != index:
            return f"give tokens different ids: {token!r} is {index} and {student_ids[token]}"
        if by_id.get(index, token) != token:
            return f"give tokens different ids: {index} is {token!r} and {by_id[index]!r}"
    added = [token for token in {**teacher.get_added_vocab(), **student.get_added_vocab()} if token in student_ids]
    for text in (*_PROBES, *(f"a {token} b" for token in added if token in teacher_ids)):
        ids = [_ids(tokenizer, text) for tokenizer in (teacher, student)]
        if ids[0] != ids[1]:
            at = next((i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), min(map(len, ids)))
            return f"read {text!r} as other tokens: from token {at} on {ids[0][at : at + 4]} and {ids[1][at : at + 4]}"
    return None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
