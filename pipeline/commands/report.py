"""The command `coldstill report`: one page of what a run or a sweep found, and the student on the hub."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from coldstill.pipeline.commands.shared import JsonOption, libraries_print_to_stderr, print_json, quieten_libraries
from coldstill.pipeline.runtime.endings import one_line_errors
from coldstill.pipeline.runtime.errors import RecipeError


def report(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN|SWEEP", help="A run's folder or recipe, or a sweep's folder.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Where the report goes; by default report/ beside the run.", show_default=False),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="Upload the run's student and its card to the hub.", show_default=False
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Of --push: into a private repository.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write what a run or a sweep found as one HTML page and its figures; it opens without a network."""
    with one_line_errors():
        quieten_libraries()
        if private and repository is None:
            raise RecipeError("--private belongs to --push OWNER/NAME")
        with libraries_print_to_stderr():
            from coldstill.pipeline.push import push
            from coldstill.pipeline.report import report

            result = report(path, output=output)
            pushed = push(path, repository, private=private) if repository else None
        if pushed and not pushed.has_numbers:
            typer.echo("coldstill: the card has no numbers yet; run: coldstill evaluate, and push again", err=True)
        if as_json:
            print_json({**dataclasses.asdict(result), "pushed": pushed.url} if pushed else result)
            return
        print(f"report     {result.page}")
        print(f"figures    {len(result.figures)}, each as SVG and PNG, in {Path(result.page).parent / 'figures'}")
        for section, reasons in result.missing.items():
            for reason in reasons:
                print(f"missing    {section}: {reason}")
        if pushed:
            print(f"pushed     {pushed.url}")
