"""The `data` section of a recipe: where documents come from, and how they become rows."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from coldstill.pipeline.recipe.fields import Count, Section, Weight, later


class SourceConfig(Section):
    """Where documents come from: the arguments of `datasets.load_dataset`, or `builtin:python-docs`."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    options: dict[str, Any] = Field(default={})
    text_column: str = "text"
    prompt_column: str | None = None
    skip_null: bool = later(False)
    max_rows: Count | None = None

    def origin(self) -> dict[str, Any]:
        """Say which documents these are, whatever number of rows is taken of them, and whatever they are called."""
        return self.model_dump(exclude={"max_rows", "label"})

    def is_of_one_kind_with(self, other: "SourceConfig") -> bool:
        """Whether both are of one data set, be it another split of it."""
        return all(getattr(self, key) == getattr(other, key) for key in ("path", "name", "data_dir", "data_files"))


class EvalSourceConfig(SourceConfig):
    """One of several sources of eval rows, which are judged each by itself too."""

    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None

    @property
    def called(self) -> str:
        """Its label; by default its file's name, its configuration's or its data set's."""
        if self.label is not None:
            return self.label
        files = [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
        places = [PurePosixPath(place).stem for place in (*files[:1], self.path)]
        # A pattern of files is no name.
        name = next((place for place in places[:-1] if "*" not in place), None) or self.name or places[-1]
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", name.removeprefix("builtin:"))


# Which of the two a value is meant to be, so that what is wrong of it is said of that one. No part of a key has a
# bracket, which is how errors know that these are none.
_ONE, _SEVERAL = "[one]", "[several]"
_EvalSources = Annotated[
    Annotated[SourceConfig, Tag(_ONE)] | Annotated[list[EvalSourceConfig], Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list) else _ONE),
]


class DataConfig(Section):
    """How documents become rows of tokens."""

    sequence_length: Annotated[int, Field(ge=2)] = 512
    packing: bool = True
    append_eos: bool = True
    prompt_weight: Annotated[Weight, Field(le=1)] = later(0.0)
    train: SourceConfig
    eval: _EvalSources

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.has_prompts and self.packing:
            raise ValueError("prompt_column needs one document a row: set data.packing to false")
        if not self.eval_sources:
            raise ValueError("eval is an empty list: name a source, or several")
        for source in self.eval_sources:
            if source.max_rows is None and self.train.origin() == source.origin():
                raise ValueError(
                    "train and eval read the same source, so eval.max_rows must say how many rows eval takes"
                )
        self._check_distinct()
        return self

    def _check_distinct(self) -> None:
        """Refuse sources of eval rows that are the same, or are called the same."""
        labels, origins = self.eval_labels, [source.origin() for source in self.eval_sources]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise ValueError(f"eval has two sources that are called {label!r}: give one of them another label")
            if origins[index] in origins[:index]:
                same = labels[origins.index(origins[index])]
                raise ValueError(f"eval reads the same source as {same!r} and as {label!r}: keep one of them")

    @property
    def eval_sources(self) -> list[SourceConfig]:
        """The sources of eval rows, in order; one where they are not a list."""
        return list(self.eval) if isinstance(self.eval, list) else [self.eval]

    @property
    def eval_labels(self) -> list[str]:
        """What the sources of eval rows are called, where they are a list."""
        return [source.called for source in self.eval] if isinstance(self.eval, list) else []

    @property
    def other_labels(self) -> list[str]:
        """Those of them that are not of train's own data set; all where there is no other."""
        if not isinstance(self.eval, list):
            return []
        others = [source.called for source in self.eval if not source.is_of_one_kind_with(self.train)]
        return others or self.eval_labels

    @property
    def has_prompts(self) -> bool:
        """Whether a source names a column of prompts."""
        return any(source.prompt_column is not None for source in (self.train, *self.eval_sources))

    def identity(self) -> dict[str, Any]:
        """Return what decides the rows, as they are found by it in a root; a weight of no prompt decides nothing."""
        said = super().identity()
        return said if self.has_prompts else {key: value for key, value in said.items() if key != "prompt_weight"}

    def source_identity(self, split: str) -> dict[str, Any]:
        """Return where the rows of a split come from, as a selection says it."""
        found = self.identity()[split]
        return {"sources": found} if isinstance(found, list) else dict(found)
