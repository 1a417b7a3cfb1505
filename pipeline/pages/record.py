"""The sections of a run's report that say what it cost, and with what it can be made again."""

import json
from collections.abc import Mapping
from typing import Any

from coldstill.pipeline.pages.data import RunRecord
from coldstill.pipeline.pages.page import Block, Code, Folded, Missing, Section, Table, Words
from coldstill.pipeline.recipe.file import dump_recipe
from coldstill.pipeline.runtime.units import format_duration, format_size


def cost_section(run: RunRecord) -> Section:
    """Say what the run cost: time, memory, bytes."""
    summary = run.summary
    rows = [
        ["training, time", format_duration(summary["seconds"])],
        ["training, steps", f"{summary['num_steps']:,}"],
        ["training, rate", f"{summary['tokens_per_s']:,.0f} tokens/s"],
        ["training, peak memory", format_size(summary["peak_memory_bytes"])],
    ]
    blocks: list[Block] = []
    stage_one = run.precompute
    if stage_one is None:
        blocks.append(Missing("The time of stage one is not known: no record of it lies in this run's folder."))
    elif not stage_one["computed_tokens"]:
        rows.append(["stage one", "nothing: every column was complete"])
    else:
        rate = stage_one["computed_tokens"] / stage_one["seconds"]
        rows.append(["stage one, time", format_duration(stage_one["seconds"])])
        rows.append(["stage one, rate", f"{rate:,.0f} tokens/s"])
    if run.store is None:
        blocks.append(Missing(f"The bytes of the store are not known any more: {run.store_problem}"))
    else:
        sizes = run.store.bytes_per_token
        rows.append(["store, what training reads", f"{sum(sizes.values()):,.0f} bytes a token"])
        columns = [[name, f"{size:,.1f}"] for name, size in sizes.items()]
        columns.append(["all", f"{sum(sizes.values()):,.1f}"])
        table = Table("Of the train rows, compressed, on disk.", ["column", "bytes a token"], columns)
        blocks.append(Folded("Bytes a token, column by column", [table]))
    table = Table("Time and rate are of all steps, also where the run was interrupted in between.", ["", "cost"], rows)
    return Section("cost", "Cost", [table, *blocks])


def record_section(run: RunRecord) -> Section:
    """Return the recipe, and where, when and with what the student was made."""
    facts = {key: value for key, value in run.provenance.items() if key not in ("run", "argv")}
    rows = [[".".join(path), str(value)] for path, value in _leaves(facts)]
    if "argv" in run.provenance:
        rows.append(["command", " ".join(run.provenance["argv"])])
    if run.store is not None:
        rows.append(["store.path", run.store.path])
        rows += [[f"rows.{split}", f"{count:,}"] for split, count in run.store.num_rows.items()]
    provenance = Table("Of the trained student.", ["", "value"], rows, word_columns=frozenset({0, 1}))
    run_key = json.dumps(run.provenance.get("run"), indent=1)
    blocks: list[Block] = [
        Words("With the recipe, the store and these versions the run can be made again."),
        Folded("Recipe, every default written out", [Code("recipe.yaml", dump_recipe(run.recipe))]),
        Folded("Provenance", [provenance]),
        Folded("What decides the trained student", [Code("run key", run_key)]),
    ]
    return Section("record", "Recipe and provenance", blocks)


def _leaves(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, item in value.items():
        found += _leaves(item, (*path, key)) if isinstance(item, Mapping) else [((*path, key), item)]
    return found
