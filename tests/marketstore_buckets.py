"""What anybody could do to the buckets of a MarketStore, beside the store and its notes."""

from __future__ import annotations

from contextlib import closing
from urllib.parse import urlsplit

from storage.marketstore_rpc import Client


def client(url: str) -> Client:
    """Return a client of the server that a store's URL names."""
    return Client(f"http://{urlsplit(url).netloc}/rpc")


def keys(url: str, name: str = "") -> list[str]:
    """Return the buckets whose symbol or attribute group begins with the name, or with that after one of our words."""

    def ours(key: str) -> bool:
        symbol, _, group = key.split("/")
        return symbol.startswith(name) or group.startswith(name) or group.startswith(f"_marketsync-rewrite.{name}")

    with closing(client(url)) as opened:
        return [key for key in opened.listed() if ours(key)]


def destroy(url: str, name: str) -> None:
    """Destroy those buckets."""
    with closing(client(url)) as opened:
        for key in keys(url, name):
            opened.destroy(key)
