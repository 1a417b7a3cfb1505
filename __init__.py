"""Coldstill: pruned language models recovered by distillation from a teacher that runs once.

    from coldstill import load_recipe, precompute, train, evaluate

    recipe = load_recipe("recipe.yaml")
    precompute(recipe)
    train(recipe)
    evaluate(recipe)

Each name is imported when it is first asked for: `import coldstill` alone loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldstill.cache.errors import ColdstillError
    from coldstill.pipeline.ablate import ablate
    from coldstill.pipeline.evaluate import evaluate
    from coldstill.pipeline.models.layer_map import create_layer_map
    from coldstill.pipeline.models.projectors import create_projectors
    from coldstill.pipeline.plan import plan
    from coldstill.pipeline.precompute import precompute
    from coldstill.pipeline.prune import prune
    from coldstill.pipeline.recipe.file import load_recipe
    from coldstill.pipeline.recipe.sections import Recipe
    from coldstill.pipeline.stage_two.distillation_trainer import UniversalDistillationTrainer
    from coldstill.pipeline.stage_two.distiller import Distiller
    from coldstill.pipeline.train import train

_MODULES = {
    "ColdstillError": "cache.errors",
    "Distiller": "pipeline.stage_two.distiller",
    "Recipe": "pipeline.recipe.sections",
    "UniversalDistillationTrainer": "pipeline.stage_two.distillation_trainer",
    "ablate": "pipeline.ablate",
    "create_layer_map": "pipeline.models.layer_map",
    "create_projectors": "pipeline.models.projectors",
    "evaluate": "pipeline.evaluate",
    "load_recipe": "pipeline.recipe.file",
    "plan": "pipeline.plan",
    "precompute": "pipeline.precompute",
    "prune": "pipeline.prune",
    "train": "pipeline.train",
}

__all__ = [
    "ColdstillError",
    "Distiller",
    "Recipe",
    "UniversalDistillationTrainer",
    "ablate",
    "create_layer_map",
    "create_projectors",
    "evaluate",
    "load_recipe",
    "plan",
    "precompute",
    "prune",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name of the public interface where it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module 'coldstill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"coldstill.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Name what there is, before it is imported."""
    return sorted({*globals(), *__all__})
