"""The `coldstill` command: its commands, put together. Each is a function of its own in `pipeline/commands/`."""

from importlib.metadata import version
from typing import Annotated

import typer

from coldstill.pipeline.commands.ablate import ablate
from coldstill.pipeline.commands.advise import advise
from coldstill.pipeline.commands.cache import cache_app
from coldstill.pipeline.commands.demo import demo
from coldstill.pipeline.commands.evaluate import evaluate
from coldstill.pipeline.commands.plan import plan
from coldstill.pipeline.commands.precompute import precompute
from coldstill.pipeline.commands.prune import prune
from coldstill.pipeline.commands.report import report
from coldstill.pipeline.commands.train import train

app = typer.Typer(
    name="coldstill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"coldstill {version('coldstill')}")
        raise typer.Exit


@app.callback()
def coldstill(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Recover pruned language models from a teacher that runs once: precompute, train, evaluate."""


# In the order in which `coldstill --help` shows them.
for _command in (demo, prune, precompute, plan, train, evaluate, ablate, advise, report):
    app.command()(_command)
app.add_typer(cache_app)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
