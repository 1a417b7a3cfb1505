"""The command `coldstill prune`: the recipe's student, cut from its teacher."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    libraries_print_to_stderr,
    load_one_recipe,
    print_json,
    print_lines,
)
from coldstill.pipeline.runtime.endings import one_line_errors

if TYPE_CHECKING:  # a command's help does not wait for torch
    from coldstill.pipeline.students.preparing import PreparedStudent

_FITTED = {"linear": "what blocks write", "blocks": "each block, by gradient"}
_NEXT_SHOWN = 4  # blocks that one cut more would have taken; pruning.json has all of them


def prune(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Make the recipe's student from its teacher."""
    with one_line_errors():
        loaded = load_one_recipe(recipe, overrides, command="prune")
        with libraries_print_to_stderr():
            from coldstill.pipeline.prune import prune

            result = prune(loaded)
        if as_json:
            print_json(result)
        else:
            print_lines(_lines(result))


def _lines(result: "PreparedStudent") -> Iterator[str]:
    """Say what was cut of the teacher, and what that cost."""
    yield f"student    {result.folder}" + ("" if result.was_made or result.report is None else " (there already)")
    report = result.report
    if report is None:
        yield "nothing was cut: the recipe's student is there already"
        return
    parameters, blocks, loss = report["parameters"], report["blocks"], report["judged"]["perplexity"]
    share = parameters["student"] / parameters["teacher"]
    yield f"parameters {parameters['student']:,} of {parameters['teacher']:,} ({share:.1%})"
    removed = "" if blocks["kept"] is None else _removed(blocks["kept"], blocks["teacher"])
    yield f"blocks     {blocks['student']} of {blocks['teacher']}{removed}"
    yield from _cut_lines(report.get("cut_costs") or [])
    for name, what in (("heads", "attention heads a block"), ("mlp", "neurons a block"), ("hidden", "channels")):
        sizes = report.get(name)
        if sizes is not None and sizes["student"] != sizes["teacher"]:
            yield f"{name:10} {sizes['student']:,} of {sizes['teacher']:,} {what}"
    if report["reconstructed"]:
        method = report["reconstructed"]
        yield f"fitted     {_FITTED[method]}, to the teacher's residual stream (reconstruct: {method})"
    rows = "the calibration rows" if report["judged"]["are_calibration"] else "train rows behind the calibration rows"
    yield (
        f"perplexity {loss['student']:,.2f}, the teacher's {loss['teacher']:,.2f}, on "
        f"{report['judged']['num_tokens']:,} tokens of {rows}"
    )


def _cut_lines(cuts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what each block that went costs on top of those before it, and which were the next in its place."""
    for number, cut in enumerate(cuts, start=1):
        costs = {block: math.inf if cost is None else cost for block, cost in cut["kl"].items()}
        others = sorted((block for block in costs if block != str(cut["removed"])), key=costs.__getitem__)
        next_ones = ", ".join(f"{block} ({costs[block]:.3f})" for block in others[:_NEXT_SHOWN])
        yield (
            f"cut {number:<6} block {cut['removed']}, for KL {costs[str(cut['removed'])]:.3f} to the teacher"
            + (f"; next {next_ones}" if next_ones else "")
        )


def _removed(kept: list[int], num_blocks: int) -> str:
    gone = [str(block) for block in range(num_blocks) if block not in kept]
    return f", without {', '.join(gone)}" if gone else ""
