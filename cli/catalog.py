"""`marketsync providers` and `datasets`: what can be had, from shipped definitions and from a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Config, Json
from cli.output import put, put_json

if TYPE_CHECKING:
    from marketsync.definition import Dataset, Definition


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("providers")(providers)
    app.command("datasets")(datasets)


def providers(as_json: Json = False) -> None:
    """List the providers that are described already: what they offer, their tiers, the secrets that they need."""
    from marketsync.configuration import load_definition, secrets_in, shipped_definitions, tiers_of

    found = {name: load_definition(name) for name in shipped_definitions()}
    if as_json:
        put_json(
            {
                "providers": [
                    {
                        "name": name,
                        "title": one.title,
                        "documentation": one.documentation,
                        "datasets": list(one.datasets),
                        "tiers": tiers_of(one),
                        "secrets": list(secrets_in(one)),
                    }
                    for name, one in found.items()
                ]
            }
        )
        return
    for name, one in found.items():
        put(f"{name}: {one.title}; {len(one.datasets)} datasets")
        if tiers_of(one):
            put(f"  tiers: {', '.join(tiers_of(one))}")
        if secrets_in(one):
            put(f"  secrets: {', '.join(secrets_in(one))}")
        if one.documentation:
            put(f"  {one.documentation}")


def datasets(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Upstreams, providers, or files with definitions; every one that is known when none."),
    ] = None,
    config: Config = Path("upstream.yml"),
    columns: Annotated[bool, typer.Option("--columns", help="Tell the columns as well.")] = False,
    as_json: Json = False,
) -> None:
    """List datasets: what each holds, what it is asked over, its calendar and when its rows are there."""
    found = _definitions(names, config)
    if as_json:
        put_json(
            {"datasets": [_plain(up, name, one) for up, spec in found.items() for name, one in spec.datasets.items()]}
        )
        return
    for upstream, definition in found.items():
        for name, dataset in definition.datasets.items():
            _show(f"{upstream}.{name}", dataset, columns)


def _definitions(names: list[str] | None, config: Path) -> dict[str, Definition]:
    from marketsync.configuration import load_configuration, load_definition, shipped_definitions

    known: dict[str, Definition] = {}
    if config.exists():
        known.update(load_configuration(config).definitions)
    if names is None or not names:
        return known or {name: load_definition(name) for name in shipped_definitions()}
    chosen = {}
    for name in names:
        definition = known.get(name) or load_definition(name)
        chosen[name if name in known else definition.provider] = definition
    return chosen


def _plain(upstream: str, name: str, dataset: Dataset) -> dict[str, object]:
    return {
        "name": f"{upstream}.{name}",
        "title": dataset.title,
        "over": _over(dataset),
        "calendar": dataset.calendar_name,
        "published": dataset.published,
        "key": list(dataset.key),
        "columns": {
            column: {"type": spec.type.value, "description": spec.description}
            for column, spec in dataset.columns.items()
        },
    }


def _over(dataset: Dataset) -> list[str]:
    parts = [
        f"{name} ({spec.universe or spec.rows or ', '.join(spec.list or ())}"
        + (f", {spec.batch} a request)" if spec.batch > 1 else ")")
        for name, spec in dataset.over.subjects.items()
    ]
    if dataset.over.window is not None:
        parts.append(f"windows of {dataset.over.window.every}")
    if dataset.over.session is not None:
        parts.append(f"sessions of {dataset.over.session}")
    return parts


def _show(name: str, dataset: Dataset, columns: bool) -> None:
    put(f"{name}: {dataset.title}" if dataset.title else name)
    put(f"  over: {'; '.join(_over(dataset)) or 'one request for all'}")
    timing = [part for part in (dataset.calendar_name, dataset.published and f"published {dataset.published}") if part]
    if timing:
        put(f"  {'; '.join(timing)}")
    if not columns:
        put(f"  columns: {', '.join(dataset.columns)}")
        return
    width = max(len(column) for column in dataset.columns)
    for column, spec in dataset.columns.items():
        key = "key" if column in dataset.key else ""
        put(f"  {column:{width}}  {spec.type.value:11}  {key:3}  {spec.description}".rstrip())
