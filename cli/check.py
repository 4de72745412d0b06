"""`marketsync check`: say everything that is wrong with a configuration file, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json
from cli.output import put, put_json
from marketsync.errors import ExitCode

if TYPE_CHECKING:
    from marketsync.configuration import Inspection


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("check")(check)


def _inspected(path: Path, secrets: bool) -> Inspection:
    """Look at the file, at the URLs of its stores, and at the tables that its plans have filled already."""
    from marketsync.configuration import Kind, inspect_file

    found = inspect_file(path, secrets_required=secrets)
    if found.kind is not Kind.UPSTREAM or found.problems:
        return found
    from tasks.inquiry import store_problems, table_problems

    return replace(found, problems=tuple(store_problems(path) or table_problems(path)))


def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="upstream.yml, maintenance.yml or definitions; upstream.yml when none is named."),
    ] = None,
    secrets: Annotated[bool, typer.Option("--secrets", help="A secret without a value is a problem too.")] = False,
    as_json: Json = False,
) -> None:
    """Check files of any of the three kinds: every problem with its file, line, field and remedy."""
    from marketsync.configuration import DEFAULT_FILE

    found = [(path, _inspected(path, secrets)) for path in files or [Path(DEFAULT_FILE)]]
    if as_json:
        put_json(
            {
                "files": [
                    {
                        "file": str(path),
                        "kind": one.kind,
                        "problems": [vars(problem) for problem in one.problems],
                        "warnings": [vars(problem) for problem in one.warnings],
                    }
                    for path, one in found
                ]
            }
        )
    else:
        told: set[tuple[Path, int | None, str, str]] = set()  # a definition's problems come with upstream.yml as well
        for path, one in found:
            fresh = 0
            for problem in one.problems:
                same = (Path(problem.file).resolve(), problem.line, problem.field, problem.message)
                if same not in told:
                    put(str(problem))
                    told.add(same)
                    fresh += 1
            if one.problems and not fresh:
                put(f"{path}: not valid, because of what is told above")
            for warning in one.warnings:
                put(f"{warning} [warning]")
            if not one.problems:
                put(f"{path}: valid ({one.summary})")
    if any(one.problems for _, one in found):
        raise typer.Exit(int(ExitCode.CONFIGURATION))
