"""Every engine by the scheme of its URL, imported only when a store of it is opened."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec

from marketsync.errors import ConfigurationError
from storage.protocol import Store

# scheme: (module with `open_url(url, name)`, the package it needs, the extra of ours that installs it)
ENGINES = {
    "chdb": ("storage.chdb", "chdb", "[clickhouse]"),
    "clickhouse": ("storage.clickhouse", "clickhouse_connect", "[clickhouse]"),
    "csv": ("storage.csv", "polars", ""),
    "delta": ("storage.delta", "deltalake", ""),
    "dolphindb": ("storage.dolphindb", "dolphindb", "[dolphindb]"),
    "excel": ("storage.excel", "fastexcel", "[excel]"),
    "marketstore": ("storage.marketstore", "msgpack", "[marketstore]"),
    "marketstores": ("storage.marketstore", "msgpack", "[marketstore]"),
    "mongodb": ("storage.mongodb", "pymongo", "[mongodb]"),
    "mongodb+srv": ("storage.mongodb", "pymongo", "[mongodb]"),
    "mysql": ("storage.mysql", "pymysql", "[mysql]"),
    "nats": ("storage.nats", "nats", "[nats]"),
    "parquet": ("storage.parquet", "polars", ""),
    "postgresql": ("storage.postgres", "adbc_driver_postgresql", "[postgres]"),
    "redis": ("storage.redis", "redis", "[redis]"),
    "rediss": ("storage.redis", "redis", "[redis]"),
}


_FOLDERS = ("chdb", "csv", "delta", "excel", "parquet")


def open_store(url: str, name: str | None = None) -> Store:
    """Return the store of `scheme://place`; `name` is what reports call it (the URL, without credentials, by default).

    Raises `ConfigurationError` for a scheme that no engine has, for an engine whose package is not installed, and for
    a place the engine cannot use; `StoreBusy` when the engine allows one process and another one has it.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in ENGINES:
        known = ", ".join(f"{each}://" for each in sorted(ENGINES))
        raise ConfigurationError(f"no store is known by {_shown(scheme)!r}; a store's URL begins with one of {known}")
    module, package, extra = ENGINES[scheme]
    if find_spec(package) is None:
        raise ConfigurationError(
            f"{scheme}:// stores need the package {package}, which is not installed; where MarketSync is checked out, "
            f"run: make install (every engine) or pip install -e '.{extra}'"
        )
    if scheme not in _FOLDERS:
        _refuse_unescaped(url, name)
    return import_module(module).open_url(url, name or _shown(url))


def _refuse_unescaped(url: str, name: str | None) -> None:
    """Refuse a user or password that ends early for whoever reads the URL, whose rest would then be shown as its host,
    its port or an option."""
    scheme, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    who, _, host = authority.rpartition("@")
    place, _, fragment = rest[len(authority) :].partition("#")
    path, _, query = place.partition("?")
    port = host.rpartition(":")[2] if ":" in host and not host.endswith("]") else ""
    option = query if port.strip("0123456789") else query.partition("=")[0]
    if "@" in path + option + fragment or re.search(r"[@\[\]\s]|%(?![0-9A-Fa-f]{2})", who):
        raise ConfigurationError(
            f"the URL of {f'the store {name}' if name else f'a {scheme}:// store'} has characters in its user or "
            "password that mean something else there: write each of @ / ? # % [ ] and blanks as % and two digits (/ is "
            f"%2F), or keep it as a secret, {scheme}://user:$secret.NAME@host, for which that is done"
        )


def _shown(url: str) -> str:
    """Return the URL without user and password, which belong in no name, report or message."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return scheme + separator + authority.rpartition("@")[2] + slash + path
