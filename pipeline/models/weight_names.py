"""Which tensors of a checkpoint become which weights of a model: renamed, joined and split as transformers does it."""

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


@dataclass
class WeightSource:
    """Tensors of a checkpoint that become one weight, or that are made into several together.

    Attributes:
        target: The weight; the first one where there are several.
        tensors: The names of the tensors, each with the pattern of the conversion that takes it, where one does.
        converter: What makes them into weights; None where the only tensor is the weight.
    """

    target: str
    tensors: list[tuple[str, str | None]]
    converter: WeightConverter | None = None

    def make(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the weights by name.

        Args:
            read: Gives a tensor by its name, on its device and in its dtype.
            model: What they belong to; it is not changed.
        """
        if self.converter is None:
            ((name, _),) = self.tensors
            return {self.target: read(name)}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.tensors:
            converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def weight_sources(model: PreTrainedModel, names: Collection[str]) -> list[WeightSource]:
    """Say what a model's weights are made of; tensors that the model has no place for are left out.

    Args:
        model: It needs no weights yet.
        names: Of the checkpoint's tensors.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, WeightSource] = {}
    for name in sorted(names, key=_natural):  # experts are joined in the order of their numbers
        target, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if target not in own and name in own:
            target, pattern = name, None
        if target in own:
            converter = None if pattern is None else by_pattern[pattern]
            sources.setdefault(target, WeightSource(target, [], converter)).tensors.append((name, pattern))
    return list(sources.values())


def _natural(name: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", name)]
