"""The shape of a recipe: strict sections with their defaults, and what must hold between keys.

Knows nothing of files, models or stores; `coldstill.pipeline.recipe.file` reads and writes recipes.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from coldstill.pipeline.recipe.data import DataConfig
from coldstill.pipeline.recipe.fields import BlockIndex, Count, Nameable, Place, Positive, Section, later
from coldstill.pipeline.recipe.loss import LossConfig
from coldstill.pipeline.recipe.presets import PresetName, learning_rate_of, with_preset
from coldstill.pipeline.recipe.student import StudentConfig
from coldstill.pipeline.recipe.training_keys import (
    OTHERS_METRIC,
    OWN_METRIC,
    TRAINING_DEFAULTS,
    check_best_metric,
    check_keep,
    check_training_keys,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HiddenEncoding = Literal["int8", "coded", "float16", "bfloat16", "float32"]
FinalEncoding = Literal["coded", "int8", "float16", "float32"]
MappingStrategy = Literal["uniform", "last", "kept", "covered", "stride", "endpoints", "pairs"]
ProjectorKind = Literal["auto", "linear", "mlp", "none"]
LogitsKind = Literal["topk", "topk_sampled", "final", "none"]
TargetSource = Literal["stored", "live"]
Placement = Literal["auto", "whole", "streamed", "spread"]


class TeacherConfig(Section):
    """The model to learn from: a folder or a hub name."""

    path: str
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    placement: Placement = later("auto")
    batch_size: Count = 8
    trust_remote_code: bool = False


# What each kind of logits target reads of its section.
_KEYS_OF_KIND: dict[LogitsKind, tuple[str, ...]] = {
    "topk": ("k", "values", "temperatures"),
    "topk_sampled": ("k", "values", "samples", "temperatures"),
    "final": ("encoding", "step"),
    "none": (),
}


class LogitsTargetConfig(Section):
    """What is kept of the teacher's next-token distribution."""

    kind: LogitsKind = "final"  # the default by measured fidelity and recovery: docs/results.md
    k: Count = 64
    values: Literal["delta", "float32"] = "delta"
    samples: Count = 32
    encoding: FinalEncoding = "coded"
    step: Nameable = 0.03
    temperatures: list[Nameable] = Field(default=[1.0, 2.0, 3.0, 4.0])

    @property
    def keys_in_use(self) -> list[str]:
        """The keys beside `kind` that this kind reads."""
        keys = _KEYS_OF_KIND[self.kind]
        return [key for key in keys if key != "step" or self.encoding == "coded"]

    def idle_keys(self) -> list[str]:
        """Say which keys are not as they are by default and yet have no effect, each with the reason."""
        idle = [key for key in _changed(self) if key not in ("kind", *self.keys_in_use)]
        reasons = {
            key: f"encoding is {self.encoding}" if key in _KEYS_OF_KIND[self.kind] else f"kind is {self.kind}"
            for key in idle
        }
        return [f"targets.logits.{key} has no effect: {reason}" for key, reason in reasons.items()]

    @field_validator("temperatures", mode="before")
    @classmethod
    def _floats(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [float(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in value]
        return value

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, value: list[float]) -> list[float]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"needs at least one temperature and none twice, got {value}")
        return value


class HiddenTargetConfig(Section):
    """Which blocks' outputs are kept, and how."""

    blocks: Literal["mapped", "none"] | list[BlockIndex] = "mapped"
    encoding: HiddenEncoding = "int8"
    step: Nameable = 0.2
    token_fraction: Annotated[Nameable, Field(le=1)] = 1.0
    inputs: list[BlockIndex] = later([])

    @property
    def named_blocks(self) -> dict[str, list[int]]:
        """The blocks that the section names by number, by key."""
        return {"inputs": self.inputs, **({"blocks": self.blocks} if isinstance(self.blocks, list) else {})}


class TargetsConfig(Section):
    """What stage one keeps of the teacher; nothing, where it speaks as training goes."""

    source: TargetSource = later("stored")
    logits: LogitsTargetConfig = LogitsTargetConfig()
    hidden: HiddenTargetConfig = HiddenTargetConfig()

    @property
    def is_live(self) -> bool:
        """Whether the teacher speaks as training goes, so that nothing is stored, and nothing rounded."""
        return self.source == "live"

    def idle_keys(self) -> list[str]:
        """Say which keys are not as they are by default and yet have no effect, each with the reason."""
        sections = {"logits": self.logits, "hidden": self.hidden}
        if self.is_live:
            return [
                f"targets.{name}.{key} has no effect: source is live, and nothing is stored"
                for name, section in sections.items()
                for key in _changed(section)
            ]
        idle = self.logits.idle_keys()
        if self.hidden.encoding != "coded" and "step" in _changed(self.hidden):
            idle.append(f"targets.hidden.step has no effect: encoding is {self.hidden.encoding}")
        return idle


class MappingConfig(Section):
    """Which teacher block each student block learns from."""

    strategy: MappingStrategy = "uniform"
    pairs: dict[BlockIndex, BlockIndex] | None = None
    num_pairs: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> "MappingConfig":
        if (self.strategy == "pairs") != (self.pairs is not None):
            raise ValueError(
                "pairs, a map from student block to teacher block, belongs to strategy pairs and to no other"
            )
        if self.pairs is not None and (not self.pairs or self.num_pairs is not None):
            raise ValueError("strategy pairs needs at least one pair, and takes no num_pairs")
        return self


class ProjectorConfig(Section):
    """How a student's hidden state is brought to the teacher's width."""

    kind: ProjectorKind = "auto"
    learnable: bool = True
    learning_rate: Positive | None = None
    init: Literal["xavier", "least_squares"] = "xavier"
    init_rows: Count = 16


class EvaluateConfig(Section):
    """How models are judged: on the eval rows, and on tasks of lm-evaluation-harness."""

    batch_size: Count = 8
    device: str = "auto"
    tasks: list[Place] = Field(default=[])
    include_path: Place | None = None
    limit: Count | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"names a task twice: {', '.join(value)}")
        return value


class Recipe(Section):
    """A whole recipe; the README explains every key."""

    output: Place
    cache: Place = "caches"
    local_copy: Place | None = None
    teacher: TeacherConfig
    data: DataConfig
    student: StudentConfig
    preset: PresetName | None = None
    targets: TargetsConfig = TargetsConfig()
    mapping: MappingConfig = MappingConfig()
    projector: ProjectorConfig = ProjectorConfig()
    loss: LossConfig = LossConfig()
    train: dict[str, Any] = Field(default={})
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _behind_what_is_given(cls, data: Any) -> Any:
        return with_preset(data) if isinstance(data, dict) else data

    @field_validator("train")
    @classmethod
    def _training_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_training_keys(value)

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        check_keep(self.train, self.loss.terms, temperature_moves=self.loss.temperature_moves)
        check_best_metric(self.train, self.loss.terms, self.data.eval_labels)
        if not self.targets.is_live:
            self._check_what_is_stored()
        return self

    @property
    def training(self) -> dict[str, Any]:
        """What `train` says, and the defaults behind it; the learning rate goes by the student."""
        student = self.student
        rate = learning_rate_of(has_adapters=student.lora is not None, narrows_stream=student.narrows_stream)
        return {**TRAINING_DEFAULTS, "learning_rate": rate, **self.train}

    def _check_what_is_stored(self) -> None:
        """Refuse a loss that learns from what is not stored."""
        loss, kind = self.loss, self.targets.logits.kind
        for weight in loss.weights_on("logits"):
            if kind == "none":
                raise ValueError(
                    f"loss.{weight} is above 0 but targets.logits.kind is none: store logits, or set loss.{weight} to 0"
                )
        for weight in loss.weights_on("hidden"):
            if self.targets.hidden.blocks == "none":
                raise ValueError(
                    f"loss.{weight} is above 0 but targets.hidden.blocks is none: store blocks, or set loss.{weight} "
                    "to 0"
                )
        if kind in ("topk", "topk_sampled"):
            self._check_temperature()

    def _check_temperature(self) -> None:
        """Refuse temperatures of the loss that the kind of logits target does not store."""
        loss, logits = self.loss, self.targets.logits
        if loss.temperature_moves:
            raise ValueError(
                f"loss.schedule.temperature passes through temperatures that targets.logits.kind {logits.kind} does "
                "not store; targets.logits.kind final answers every temperature: use it, or a constant temperature"
            )
        if loss.needs_logits and loss.temperature not in logits.temperatures:
            stored = ", ".join(f"{temperature:g}" for temperature in logits.temperatures)
            raise ValueError(
                f"loss.temperature {loss.temperature:g} is not stored; targets.logits.temperatures has {stored}: use "
                "one of these, add it there and run: coldstill precompute, or store what gives every temperature: "
                "targets.logits.kind=final"
            )

    def idle_keys(self) -> list[str]:
        """Say which keys are not as they are by default and yet have no effect, each with the reason."""
        loss = self.loss
        idle = self.targets.idle_keys()
        if self.teacher.placement == "spread" and "device" in _changed(self.teacher):
            idle.append("teacher.device has no effect: placement is spread")
        if "prompt_weight" in _changed(self.data) and not self.data.has_prompts:
            idle.append("data.prompt_weight has no effect: no source names a prompt_column")
        if not loss.ever("delta") and "dynamics" in _changed(loss):
            idle.append("loss.dynamics has no effect: delta is 0")
        projector = _changed(self.projector)
        if "init_rows" in projector and self.projector.init != "least_squares":
            idle.append(f"projector.init_rows has no effect: init is {self.projector.init}")
        if "init" in projector and (self.projector.kind == "none" or not loss.needs_hidden):
            reason = "kind is none" if self.projector.kind == "none" else "gamma and delta are 0"
            idle.append(f"projector.init has no effect: {reason}")
        if loss.divergence != "selective":
            given = [key for key in _changed(loss) if key.startswith("selective_")]
            idle += [f"loss.{key} has no effect: divergence is {loss.divergence}" for key in given]
        if not self.evaluate.tasks:
            given = [key for key in _changed(self.evaluate) if key in ("include_path", "limit", "num_fewshot")]
            idle += [f"evaluate.{key} has no effect: evaluate.tasks is empty" for key in given]
        return idle

    @property
    def kept_by(self) -> str | None:
        """What the best step is the best by, as the log calls it, where the best is kept; None where the last is."""
        if self.train.get("keep") != "best":
            return None
        return OTHERS_METRIC if self.data.eval_labels else OWN_METRIC

    @property
    def seed(self) -> int:
        """The seed of training, and of every random choice that is not the data's."""
        return int(self.train.get("seed", 42))


def _changed(section: BaseModel) -> list[str]:
    """Name the keys of a section that are not as they are by default."""
    defaults = type(section).model_fields
    return [key for key, field in defaults.items() if getattr(section, key) != field.default]
