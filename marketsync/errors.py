"""Every exception MarketSync raises on purpose, and the exit code each one stands for.

A message is for a person: what was being done, to what, why it failed, what to do next. Nothing here imports
anything of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


class ExitCode(IntEnum):
    """What the process ends with; the gravest of several wins (see `gravest`)."""

    DONE = 0
    FAILED = 1
    CONFIGURATION = 2
    FINDINGS = 3
    PAUSED = 4
    WAITING = 75


_GRAVITY = (
    ExitCode.CONFIGURATION,
    ExitCode.FAILED,
    ExitCode.PAUSED,
    ExitCode.WAITING,
    ExitCode.FINDINGS,
    ExitCode.DONE,
)


def gravest(*codes: ExitCode) -> ExitCode:
    """Return the gravest of the codes in the order 2, 1, 4, 75, 3, 0 (`DONE` for none)."""
    return min(codes, key=_GRAVITY.index, default=ExitCode.DONE)


class MarketSyncError(Exception):
    """The root of our exceptions; `exit_code` is what a command that meets it ends with."""

    exit_code = ExitCode.FAILED


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration file: where it stands, what is wrong, what would be valid."""

    file: str
    line: int | None
    field: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        text = ": ".join(part for part in (place, self.field, self.message) if part)
        return text + (f" ({self.remedy})" if self.remedy else "")


class ConfigurationError(MarketSyncError):
    """A definition, an upstream.yml, a maintenance.yml or an argument is wrong; carries every problem found."""

    exit_code = ExitCode.CONFIGURATION

    def __init__(self, problems: list[Problem] | str):
        self.problems = [Problem("", None, "", problems)] if isinstance(problems, str) else list(problems)
        super().__init__(
            problems if isinstance(problems, str) else "\n".join(str(problem) for problem in self.problems)
        )


class SecretMissing(ConfigurationError):
    """A `$secret.NAME` has no value in the environment or in a file; the message names both places to put it."""


class SchemaError(MarketSyncError):
    """A frame or a table does not fit its dataset's schema and cannot be made to without losing a value."""


class RowsRefused(SchemaError):
    """Rows have values that the store would not give back; `rows` is the frame of them. Nothing was written."""

    def __init__(self, message: str, rows: pl.DataFrame):
        super().__init__(message)
        self.rows = rows

    def __reduce__(self) -> tuple[type[RowsRefused], tuple[str, pl.DataFrame]]:
        return type(self), (str(self), self.rows)


class SchemaConflict(SchemaError):
    """A table with rows cannot follow its definition as it is now: the definition is to be changed, or the table."""

    exit_code = ExitCode.CONFIGURATION


class AdoptionRefused(SchemaError):
    """A table that is there already cannot become a dataset's table as it is; carries every reason. Nothing changed."""

    exit_code = ExitCode.CONFIGURATION

    def __init__(self, table: str, reasons: Sequence[str]):
        self.reasons = tuple(reasons)
        told = "\n".join(f"  - {reason}" for reason in self.reasons)
        super().__init__(f"{table} cannot be adopted as it is, and nothing was changed:\n{told}")


class StoreError(MarketSyncError):
    """A store could not do what it was asked: unreachable, refused, held by another process."""


class ForeignTable(StoreError):
    """A table that MarketSync did not make stands where a dataset's table belongs: it is to be adopted, or moved."""

    exit_code = ExitCode.CONFIGURATION


class NoTable(StoreError):
    """There is no table in the store that could be adopted."""

    exit_code = ExitCode.CONFIGURATION


class StoreBusy(StoreError):
    """Another process holds the store's owner lock; the message names the holder."""


class QueryRefused(StoreError):
    """The text is not a question that the store can be asked: no SELECT, not SQL, or of a table that there is not."""

    exit_code = ExitCode.CONFIGURATION


class StoreDamaged(StoreError):
    """A store's files are not as they were written: missing, cut short or changed by something else."""


class CapabilityError(StoreError):
    """The store cannot do this by its nature (see its `capabilities`); the message says what to do instead."""

    exit_code = ExitCode.CONFIGURATION


class ProviderError(MarketSyncError):
    """A provider answered with something its definition does not explain."""


class LeaseLost(MarketSyncError):
    """Another worker took the unit over (epoch moved on); whatever this one still holds must be thrown away."""

    def __init__(self, work_id: str, message: str):
        super().__init__(message)
        self.work_id = work_id


class Interrupted(MarketSyncError):
    """A pause, a cancellation or SIGTERM reached a wait or a loop."""

    exit_code = ExitCode.PAUSED


class WaitingForQuota(MarketSyncError):
    """A quota is spent, or a cool-down is longer than the plan's `max_wait`; `resume_at` says when to go on."""

    exit_code = ExitCode.WAITING

    def __init__(self, message: str, resume_at):
        super().__init__(message)
        self.resume_at = resume_at
