"""The commands `coldstill cache ...`: list, check, repair and remove stores."""

import contextlib
import dataclasses
from typing import Annotated

import typer

from coldstill.cache.errors import ColdstillError, StoreError
from coldstill.pipeline.commands.cache_tables import (
    column_table,
    live_lines,
    live_table,
    repair_lines,
    selection_table,
    store_lines,
    store_table,
    verify_lines,
    what_is_lost,
)
from coldstill.pipeline.commands.shared import (
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    console,
    libraries_print_to_stderr,
    load_one_recipe,
    print_json,
    print_lines,
    quieten_libraries,
)
from coldstill.pipeline.runtime.endings import DAMAGED, one_line_errors
from coldstill.pipeline.runtime.errors import RecipeError

cache_app = typer.Typer(name="cache", no_args_is_help=True, help="List, check, repair and remove stores.")

RootArgument = Annotated[str, typer.Argument(help="What recipes name as `cache`: a folder or a URL.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Its name, or the beginning of it, where there are several.", show_default=False),
]


@cache_app.command("ls")
def list_stores(root: RootArgument = "caches", as_json: JsonOption = False) -> None:
    """List the stores of a root."""
    with one_line_errors():
        from coldstill.cache.inventory import describe_store, list_stores

        stores, damaged = [], []
        for name in list_stores(root):
            try:
                stores.append(describe_store(root, name))
            except StoreError as error:
                damaged.append(str(error))
        if as_json:
            print_json({"stores": stores, "damaged": damaged})
        else:
            console().print(store_table(stores))
        for message in damaged:
            typer.echo(f"coldstill: {message}", err=True)
        if damaged:
            raise typer.Exit(DAMAGED)


@cache_app.command("info")
def show_store(root: RootArgument = "caches", store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show columns, share complete, size, age, teacher and selections of a store, or of all in a root."""
    with one_line_errors():
        from coldstill.cache.inventory import choose_stores, describe_store

        described = [describe_store(root, name) for name in choose_stores(root, store)]
        if as_json:
            print_json(described)
            return
        for summary in described:
            print_lines(store_lines(summary))
            console().print(column_table(summary))
            console().print(selection_table(summary))


@cache_app.command("verify")
def verify_root(
    root: RootArgument = "caches",
    live: Annotated[
        int | None,
        typer.Option(
            "--live",
            metavar="N",
            min=1,
            help="Also run the teacher again over N rows of a store, and compare every column.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--store", help="Of --live: the store's name, or the beginning of it.", show_default=False),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="PATH", help="Of --live: where the teacher is now.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte of a root and hold it against its checksum; exit code 1 where anything is wrong."""
    with one_line_errors():
        from coldstill.pipeline.verify import verify

        if live is None and (store or teacher):
            raise RecipeError("--store and --teacher belong to --live N; without it all stores are read, by no teacher")
        audit = verify(root)
        if not as_json:
            print_lines(verify_lines(audit))
        checked = None
        if live is not None and audit.is_clean:
            quieten_libraries()
            with libraries_print_to_stderr():
                from coldstill.pipeline.stage_one.live_check import live_check

                checked = live_check(root, store=store, num_rows=live, teacher_path=teacher)
        if as_json:
            answer = {**dataclasses.asdict(audit), "is_clean": audit.is_clean}
            found = checked and {**dataclasses.asdict(checked), "is_within": checked.is_within}
            print_json(answer if live is None else {**answer, "live": found})
        elif checked:
            console().print(live_table(checked))
            print_lines(live_lines(checked))
        if not audit.is_clean or (checked and not checked.is_within):
            raise typer.Exit(DAMAGED)


@cache_app.command("repair")
def repair_store(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Drop exactly what is damaged in the store of a recipe's teacher, and compute it again."""
    with one_line_errors():
        loaded = load_one_recipe(recipe, overrides, command="repair")
        with libraries_print_to_stderr():
            from coldstill.pipeline.repair import repair

            result = repair(loaded)
        if as_json:
            print_json(result)
        else:
            print_lines(repair_lines(result))


@cache_app.command("rm")
def remove(
    root: RootArgument = "caches",
    store: StoreOption = None,
    column: Annotated[str | None, typer.Option(help="Remove only this column.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove a store, or one column of it."""
    with one_line_errors():
        from coldstill.cache.inventory import choose_stores, describe_store, remove_column, remove_store
        from coldstill.cache.store import open_store, store_path

        (name,) = choose_stores(root, store, just_one=True)
        path = store_path(root, name)
        what = f"column {column} of {path}" if column else path
        if not column:
            # What cannot be opened can still be removed.
            with contextlib.suppress(ColdstillError):
                what = f"{path}: {what_is_lost(describe_store(root, name))}"
        if not yes:
            typer.confirm(f"remove {what}?", abort=True, err=True)
        if column:
            remove_column(open_store(path), column)
        else:
            remove_store(root, name)
        if as_json:
            print_json({"store": path, "column": column})
        else:
            print(f"removed {what}")
