"""The student section of a recipe: a model that is there, the teacher pruned, or a smaller one designed after it."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, field_validator, model_validator

from coldstill.pipeline.recipe.fields import BlockIndex, Count, Fraction, Section, later
from coldstill.pipeline.recipe.presets import Cut, cut_of
from coldstill.pipeline.recipe.training_keys import check_lora_keys

PruneMethod = Literal["last", "first", "importance", "kl", "explicit"]
# Which of them choose by running the teacher.
MEASURED_METHODS: frozenset[PruneMethod] = frozenset({"importance", "kl"})
MlpImportance = Literal["weights", "activations"]
ReconstructMethod = Literal["linear", "blocks"]
DesignShape = Literal["depth", "width", "balanced"]
InitialWeights = Literal["copy", "truncate", "interpolate"]


def _read_reconstruct(value: Any) -> Any:
    if value is True:
        return "linear"  # which is what it meant before there was another
    if value is not False and value not in ("auto", *get_args(ReconstructMethod)):
        raise ValueError(f"takes auto, {', '.join(get_args(ReconstructMethod))} or false")
    return value


Reconstruct = Annotated[Literal["auto", False] | ReconstructMethod, BeforeValidator(_read_reconstruct)]
# How many rows a student is made by where a recipe does not say: least squares need few, training a block more.
_CALIBRATION_ROWS, _CALIBRATION_ROWS_OF_BLOCKS = 16, 64


class PruneLayersConfig(Section):
    """Which decoder blocks to remove."""

    remove: Count | None = None
    method: PruneMethod = "importance"
    blocks: list[BlockIndex] | None = None

    @model_validator(mode="after")
    def _check(self) -> "PruneLayersConfig":
        if self.method == "explicit" and (not self.blocks or self.remove is not None):
            raise ValueError("method explicit takes blocks, a list of the blocks to remove, and no remove")
        if self.method != "explicit" and (self.remove is None or self.blocks is not None):
            raise ValueError(f"method {self.method} takes remove, a number of blocks, and no blocks")
        if self.blocks is not None and len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks names a block twice: {self.blocks}")
        return self


class PruneMlpConfig(Section):
    """How many neurons each block's gated MLP keeps."""

    keep: Fraction | None = None
    size: Count | None = None
    method: MlpImportance = "activations"  # the default by measured perplexity: docs/results.md

    @model_validator(mode="after")
    def _check(self) -> "PruneMlpConfig":
        if (self.keep is None) == (self.size is None):
            raise ValueError("mlp takes either keep, the share of neurons that stay, or size, their number")
        return self


class PruneHeadsConfig(Section):
    """How many key-value heads, each with the query heads that read it, each block's attention keeps."""

    keep: Fraction | None = None
    size: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "PruneHeadsConfig":
        if (self.keep is None) == (self.size is None):
            raise ValueError("heads takes either keep, the share of key-value heads that stay, or size, their number")
        return self


class PruneHiddenConfig(Section):
    """How many channels the residual stream keeps."""

    size: Count


class PruneConfig(Section):
    """How the student is cut from the teacher: in depth, in heads, in the widths of MLPs and residual stream."""

    layers: PruneLayersConfig | None = None
    heads: PruneHeadsConfig | None = later(None)
    mlp: PruneMlpConfig | None = None
    hidden: PruneHiddenConfig | None = None
    reconstruct: Reconstruct = "auto"  # the default by measured recovery: docs/results.md
    calibration_rows: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "PruneConfig":
        if not self.is_deep and not self.is_wide:
            raise ValueError("prune needs layers, heads, mlp or hidden: what is to be cut")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether what is cut depends on calibration rows."""
        by_activations = self.mlp is not None and self.mlp.method == "activations"
        by_blocks = self.layers is not None and self.layers.method in MEASURED_METHODS
        by_writing = self.heads is not None or self.hidden is not None
        return by_blocks or by_activations or by_writing or bool(self.reconstruct)

    @property
    def num_calibration_rows(self) -> int:
        """How many rows the student is made by."""
        return _num_calibration_rows(self)

    @property
    def is_deep(self) -> bool:
        """Whether blocks go."""
        return self.layers is not None

    @property
    def is_wide(self) -> bool:
        """Whether heads, neurons or channels go."""
        return self.heads is not None or self.mlp is not None or self.hidden is not None


class InitConfig(Section):
    """A smaller architecture of the teacher's family, and where its weights come from."""

    parameters: Count | None = None
    compression: Fraction | None = None
    shape: DesignShape = "balanced"
    weights: InitialWeights = "copy"
    reconstruct: Reconstruct = later("auto")
    calibration_rows: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "InitConfig":
        if (self.parameters is None) == (self.compression is None):
            raise ValueError(
                "init takes either parameters, how many the student has, or compression, the share of the teacher's "
                "that it has"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether the student's weights depend on calibration rows."""
        return self.weights == "copy" or bool(self.reconstruct)

    @property
    def num_calibration_rows(self) -> int:
        """How many rows the student is made by."""
        return _num_calibration_rows(self)


def _num_calibration_rows(section: PruneConfig | InitConfig) -> int:
    if section.calibration_rows is not None:
        return section.calibration_rows
    return _CALIBRATION_ROWS_OF_BLOCKS if section.reconstruct in ("auto", "blocks") else _CALIBRATION_ROWS


class StudentConfig(Section):
    """The model to train: one that is there already, the teacher pruned, or one designed after the teacher."""

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    prune: PruneConfig | None = None
    init: InitConfig | None = None
    lora: dict[str, Any] | None = None

    @property
    def made_from_teacher(self) -> PruneConfig | InitConfig | None:
        """How the student is made of the teacher; None where it is there already."""
        return self.prune or self.init

    @property
    def cut(self) -> Cut:
        """What the section cuts; depth where it does not say, which changes a student least."""
        return "depth" if self.prune is None else cut_of(is_deep=self.prune.is_deep, is_wide=self.prune.is_wide)

    @property
    def narrows_stream(self) -> bool:
        """Whether the section says that the residual stream loses channels."""
        return self.prune is not None and self.prune.hidden is not None

    @field_validator("lora")
    @classmethod
    def _lora_arguments(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else check_lora_keys(value)

    @model_validator(mode="after")
    def _check(self) -> "StudentConfig":
        if sum(source is not None for source in (self.path, self.prune, self.init)) != 1:
            raise ValueError(
                "student takes exactly one of path, a model that is there, prune, how to cut one, and init, how to "
                "design one"
            )
        return self
