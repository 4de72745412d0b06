"""Tells a user's own `storage.py` or `tasks.py` from ours before Python mixes the two up.

Our packages have plain names, and Python looks beside the script (or in the notebook's folder) first. Without this the
user would read "'storage' is not a package" and search for the fault in MarketSync.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from marketsync.errors import ExitCode, MarketSyncError

HOME = Path(__file__).resolve().parent.parent


class Shadowed(MarketSyncError, ImportError):
    """A file or folder that is not ours is imported under the name of one of our packages; `path` holds it."""

    exit_code = ExitCode.CONFIGURATION


def refuse_shadows(names: Iterable[str]) -> None:
    """Raise `Shadowed` when one of our packages of these names would be (or has been) imported from elsewhere."""
    for name in names:
        place = _place(name)
        if place is not None and place != HOME / name:
            raise Shadowed(
                f"import {name} finds {place}, which hides MarketSync's own package of that name ({HOME / name}); "
                f"rename {place.name}, or run from another folder (for a script: python -P also keeps its own folder "
                "out of the search)",
                name=name,
                path=str(place),
            )


def _place(name: str) -> Path | None:
    """Return the file or folder that `import name` gives; a package's is its folder. None when there is none."""
    if name in sys.modules:
        module = sys.modules[name]
        file, folders = getattr(module, "__file__", None), getattr(module, "__path__", ())
    else:
        spec = find_spec(name)
        if spec is None:
            return None
        file, folders = spec.origin, spec.submodule_search_locations or ()
    # A folder without __init__.py has no file, and hides a package behind it all the same.
    found = next(iter(folders), None) or file
    return None if found is None else Path(found).resolve()
