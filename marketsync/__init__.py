"""The public Python API: `from marketsync import open_store, sync, estimate, ...`, and nothing that costs anything yet.

Each name is imported when it is first asked for, so that `import marketsync` stays cheap and imports keep pointing one
way (the rooms import this package, never the reverse; these names are looked up by text). Their types are in
`__init__.pyi`; what they do is in `storage/reader.py`,
`storage/following.py` and `tasks/public.py`.
"""

from __future__ import annotations

# name: (module, attribute, the top-level packages that its import needs)
_PUBLIC = {
    "open_store": ("storage.reader", "open_reader", ("storage",)),
    "follow": ("storage.following", "follow", ("storage",)),
    "sync": ("tasks.public", "sync", ("providers", "storage", "tasks")),
    "estimate": ("tasks.public", "estimate", ("providers", "storage", "tasks")),
    "status": ("tasks.public", "status", ("providers", "storage", "tasks")),
    "read_report": ("tasks.public", "read_report", ("providers", "storage", "tasks")),
    "explain": ("tasks.public", "explain", ("providers", "storage", "tasks")),
    "stores": ("tasks.public", "stores", ("providers", "storage", "tasks")),
    "copy": ("tasks.public", "copy", ("providers", "storage", "tasks")),
    "query": ("tasks.public", "query", ("providers", "storage", "tasks")),
    "export": ("tasks.public", "export", ("providers", "storage", "tasks")),
    "MarketSyncError": ("marketsync.errors", "MarketSyncError", ()),
}

__all__ = list(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    from importlib import import_module

    module, attribute, rooms = _PUBLIC[name]
    if rooms:
        from marketsync.shadowing import refuse_shadows

        refuse_shadows(rooms)
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
