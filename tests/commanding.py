"""The command line in the process of the tests."""

from typing import Any

from typer.testing import CliRunner, Result

from coldstill.cli import app


def run_command(*arguments: Any, expect: int = 0) -> Result:
    """Run `coldstill`, and hold its exit code against the one that is expected."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.output
    return result
