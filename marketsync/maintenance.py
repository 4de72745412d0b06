"""The file an operator owns, `maintenance.yml`: stores that must agree (links), who wins, tuning, reporting.

Only the shape is here; `marketsync check` validates it. Comparison and repair read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from marketsync.definition import Model, SpanText
from marketsync.upstream import Name, StoreSpec, _as_store, _unknown


class Link(Model):
    """Two or more stores that must agree."""

    stores: tuple[Name, ...] = Field(min_length=2, description="The stores, such as [mktsdb-01, mktsdb-02].")
    datasets: tuple[str, ...] = Field(default=(), description="Datasets to compare; empty: all that every store has.")
    policy: Name = Field(default="default", description="The policy that says who wins.")
    lag: SpanText = Field(default="1 day", description="Rows younger than this are not compared yet.")


class Policy(Model):
    """Who wins where stores differ, and what a repair may do."""

    winner: Literal["authority", "majority", "newest", "refetch"] = Field(
        default="majority", description="authority (the store named), majority, newest, or refetch from the provider."
    )
    authority: Name | None = Field(default=None, description="With winner authority: the store that is right.")
    delete: bool = Field(default=False, description="Whether a repair may delete rows that the winner does not have.")
    max_changes: int = Field(default=10_000, ge=1, description="A repair that would change more rows asks first.")

    @model_validator(mode="after")
    def _authority_named(self) -> Self:
        if (self.winner == "authority") != (self.authority is not None):
            raise ValueError("authority names the winning store, with winner: authority and only then")
        return self


class MaintenanceTuning(Model):
    """How hard comparison and repair work."""

    threads: int = Field(default=2, ge=1, le=64, description="Spans compared at once.")
    span: SpanText = Field(default="1 month", description="The span of one fingerprint.")


class Reporting(Model):
    """Where reports go."""

    html: str | None = Field(default=None, description="A folder for HTML reports.")
    slack: str | None = Field(default=None, description="A Slack channel; the token is $secret.SLACK_TOKEN.")
    email: tuple[str, ...] = Field(default=(), description="Addresses to mail reports to.")
    only_findings: bool = Field(default=True, description="Whether to stay silent when nothing was found.")


def _with_default(value: Any) -> Any:
    return {"default": {}, **value} if isinstance(value, dict) else value


class Maintenance(Model):
    """The whole of maintenance.yml."""

    stores: dict[Name, Annotated[StoreSpec, BeforeValidator(_as_store)]] = Field(description="Stores by name.")
    links: dict[Name, Link] = Field(default={}, description="Stores that must agree, by name.")
    policies: Annotated[dict[Name, Policy], BeforeValidator(_with_default)] = Field(
        default={"default": Policy()}, description="Policies by name; default is there even if it is not given."
    )
    tuning: MaintenanceTuning = Field(default=MaintenanceTuning(), description="How hard to work.")
    reporting: Reporting = Field(default=Reporting(), description="Where reports go.")

    @model_validator(mode="after")
    def _references(self) -> Self:
        problems = list(self._broken_references())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _broken_references(self) -> Iterator[str]:
        for name, link in self.links.items():
            for store in link.stores:
                if store not in self.stores:
                    yield f"links.{name}.stores: {_unknown('store', store, self.stores)}"
            if link.policy not in self.policies:
                known = ", ".join(self.policies)
                yield f"links.{name}.policy: there is no policy '{link.policy}'; policies: {known}"
        for name, policy in self.policies.items():
            if policy.authority is not None and policy.authority not in self.stores:
                yield f"policies.{name}.authority: {_unknown('store', policy.authority, self.stores)}"
