"""What of a model decides the shapes of what it says."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from coldstill.pipeline.models.loading import text_config


@dataclass(frozen=True)
class ModelSizes:
    """A model's sizes.

    Attributes:
        width: Of its residual stream.
        vocab_size: Entries of its vocabulary.
    """

    width: int
    vocab_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ModelSizes":
        """Read them off a config."""
        section = text_config(config)
        return cls(int(section.hidden_size), int(section.vocab_size))
