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
        typer.Argument(
            help="Upstreams, providers, datasets (alpaca.daily_bars) or files with definitions; all when none is named."
        ),
    ] = None,
    config: Config = Path("upstream.yml"),
    columns: Annotated[bool, typer.Option("--columns", help="Tell the columns as well.")] = False,
    as_json: Json = False,
) -> None:
    """List datasets: what each holds, what it is asked over, its calendar and when its rows are there."""
    found = _chosen(names or [], config)
    if as_json:
        put_json({"datasets": [_plain(upstream, name, one) for (upstream, name), one in found.items()]})
        return
    for (upstream, name), dataset in found.items():
        _show(f"{upstream}.{name}", dataset, columns)


def _chosen(names: list[str], config: Path) -> dict[tuple[str, str], Dataset]:
    """Return what the names mean, by upstream and name: all of an upstream, a provider or a file, or one dataset."""
    from marketsync.configuration import load_configuration, load_definition, shipped_definitions
    from marketsync.errors import ConfigurationError
    from marketsync.names import choice

    known: dict[str, Definition] = {}
    if config.exists():
        known.update(load_configuration(config).definitions)
    shipped = shipped_definitions()
    chosen: dict[tuple[str, str], Dataset] = {}
    for name in names or [*known] or [*shipped]:
        whose, dot, wanted = name.partition(".")
        one = dot and (whose in known or whose in shipped) and not Path(name).exists()
        source = whose if one else name
        definition = known.get(source) or load_definition(source)
        upstream = source if source in known else definition.provider
        if one and wanted not in definition.datasets:
            hint = choice(wanted, list(definition.datasets), sign="")
            raise ConfigurationError(f"{whose} has no dataset '{wanted}'; {hint}")
        datasets = {wanted: definition.datasets[wanted]} if one else definition.datasets
        chosen.update({(upstream, each): dataset for each, dataset in datasets.items()})
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
