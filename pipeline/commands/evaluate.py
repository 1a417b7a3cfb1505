"""The command `coldstill evaluate`: the three models, judged."""

from coldstill.pipeline.commands.evaluation_tables import print_evaluation
from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    libraries_print_to_stderr,
    load_one_recipe,
    print_json,
)
from coldstill.pipeline.runtime.endings import one_line_errors


def evaluate(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Judge teacher, pruned and recovered student on the eval rows, and on the recipe's tasks."""
    with one_line_errors():
        loaded = load_one_recipe(recipe, overrides, command="evaluate")
        with libraries_print_to_stderr():
            from coldstill.pipeline.evaluate import evaluate

            result = evaluate(loaded)
        if as_json:
            print_json(result)
        else:
            print_evaluation(result)
