"""A local stand-in for three market-data providers: Alpaca, Tushare Pro and Nasdaq Data Link, on one loopback port.

It speaks their protocols closely enough that their own clients read from it, enforces accounts, rates and quotas by its
own clock, breaks on request in each provider's words, and logs every request with the verdict it should provoke. It
shares no code with the machinery that reads from providers, so that one can prove the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from providers.replica.journal import most_at_once, repeated, violations
    from providers.replica.server import Replica

__all__ = ["Replica", "most_at_once", "repeated", "violations"]


def __getattr__(name: str):
    if name == "Replica":
        from providers.replica.server import Replica

        return Replica
    if name in ("most_at_once", "repeated", "violations"):
        from providers.replica import journal

        return getattr(journal, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
