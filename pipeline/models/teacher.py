"""The teacher: where its files are, which one it is, and the model itself. Stage two never imports this."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from coldstill.cache.identity import digest_of, fingerprint, row_id
from coldstill.pipeline.models import (
    ModelParts,
    identify,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_folder,
    take_apart,
    text_config,
)
from coldstill.pipeline.models.forward import mean_loss
from coldstill.pipeline.models.placement import WeightBytes, check_placement, choose_placement
from coldstill.pipeline.models.quantised import bytes_when_dense, quantisation_of, runs_dense
from coldstill.pipeline.models.streaming import load_streamed
from coldstill.pipeline.recipe.sections import Placement, TeacherConfig


@dataclass
class Teacher:
    """A teacher whose weights are loaded when they are first needed, and only then.

    Attributes:
        section: The recipe's teacher section.
        folder: Where its files are.
        config: Its config.
    """

    section: TeacherConfig
    folder: Path
    config: PreTrainedConfig
    _losses: dict[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def locate(cls, section: TeacherConfig) -> "Teacher":
        """Find the teacher's files and read its config.

        Raises:
            ModelError: There is no such model.
        """
        folder = resolve_folder(section.path, revision=section.revision)
        return cls(section, folder, load_config(folder, trust_remote_code=section.trust_remote_code))

    @property
    def dtype(self) -> str:
        """The dtype that the forward pass runs in."""
        return resolve_dtype(self.config, self.section.dtype)

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return int(text_config(self.config).num_hidden_layers)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Which teacher this is, by content."""
        return identify(self.folder, self.config, dtype=self.dtype)

    @property
    def fingerprint(self) -> str:
        """The name of this teacher's store."""
        return fingerprint(self.identity)

    @cached_property
    def device(self) -> torch.device:
        """Where the forward pass runs."""
        return resolve_device(self.section.device)

    @property
    def quantisation(self) -> str | None:
        """The method that its weights are quantised by; None where they are not."""
        return quantisation_of(self.config)

    @cached_property
    def weights(self) -> WeightBytes:
        """What its weights take in memory, by the headers of its files.

        Raises:
            ModelError: A file is missing or damaged, or transformers cannot load it on this machine.
        """
        if self.quantisation is None:
            return WeightBytes.of(self.folder, self.config, dtype=self.dtype)
        is_dense = runs_dense(self.config, self.folder, dtype=self.dtype, device=self.device)
        as_stored = WeightBytes.of(self.folder, self.config, dtype=None)
        if not is_dense:
            return as_stored
        trust = self.section.trust_remote_code
        return replace(as_stored, total=bytes_when_dense(self.config, dtype=self.dtype, trust_remote_code=trust))

    @cached_property
    def placement(self) -> Placement:
        """How its weights lie in memory: whole, streamed or spread."""
        return choose_placement(self.section, self.weights, self.device, quantisation=self.quantisation)

    def check_placement(self) -> None:
        """Refuse a placement that cannot be on this machine, before anything is loaded.

        Raises:
            RecipeError: It cannot be.
            ModelError: A file of its weights is missing or damaged, or transformers cannot load it on this machine.
        """
        check_placement(self.section, self.placement, self.weights, self.device, quantisation=self.quantisation)

    @cached_property
    def parts(self) -> ModelParts:
        """The model, loaded at the first use."""
        trust = self.section.trust_remote_code
        if self.placement == "streamed":
            return load_streamed(self.folder, dtype=self.dtype, device=self.device, trust_remote_code=trust)
        is_spread = self.placement == "spread"
        # Quantised weights are laid where they stay while they are read: not all of their kinds can move.
        device = self.device if self.quantisation is not None else None
        model = load_model(self.folder, dtype=self.dtype, trust_remote_code=trust, is_spread=is_spread, device=device)
        return take_apart(model if is_spread or device is not None else model.to(self.device))

    @property
    def is_loaded(self) -> bool:
        """Whether the weights were needed yet."""
        return "parts" in self.__dict__

    def loss_on(self, rows: Sequence[np.ndarray]) -> float:
        """Return the mean cross entropy over rows of token ids, in nats a token; the same rows are read once."""
        key = digest_of([row_id(tokens).hex() for tokens in rows])
        if key not in self._losses:
            self._losses[key] = mean_loss(self.parts.model, [torch.from_numpy(tokens) for tokens in rows])
        return self._losses[key]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the model."""
        return load_tokenizer(self.folder, trust_remote_code=self.section.trust_remote_code)

    def describe(self) -> dict[str, Any]:
        """Return the facts that a store keeps of its teacher, JSON-able."""
        config = text_config(self.config)
        return {
            "identity": self.identity,
            "name": self.section.path,
            "revision": self.section.revision,
            "architecture": (self.config.architectures or [type(self.config).__name__])[0],
            "num_blocks": self.num_blocks,
            "hidden_size": int(config.hidden_size),
            "vocab_size": int(config.vocab_size),
        }
