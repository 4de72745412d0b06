"""Where things are: a store's URL to the folder it means, a dataset's name to its place in it.

Nothing here opens a file.
"""

from __future__ import annotations

import re
from pathlib import Path

from marketsync.errors import ConfigurationError, StoreError

_LONGEST = 200  # characters of a dataset's name where files are named after it, with endings of ours
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.[A-Za-z0-9][A-Za-z0-9_-]*")


def folder(url: str) -> Path:
    """Return the absolute folder of `scheme://./relative`, `scheme://relative`, `scheme://~/home` or `scheme:///abs`.

    Raises `ConfigurationError` for an URL with options (`?...`) or without a folder.
    """
    scheme, _, place = url.partition("://")
    if not place or "?" in place or "#" in place:
        raise ConfigurationError(
            f"the store {url!r} does not name a folder: write {scheme}://./folder (beside the working directory) "
            f"or {scheme}:///folder (absolute), without ? or #"
        )
    return Path(place).expanduser().resolve()


def absent(what: str, dataset: str, place: object) -> StoreError:
    """Return the error of a read or write of what is not there."""
    return StoreError(
        f"there is no {what} of {dataset} in {place}: datasets() says which there are, ensure() makes one"
    )


def split(dataset: str) -> tuple[str, str]:
    """Return (provider, name) of `provider.name`; raises `ConfigurationError` for anything else."""
    if not is_dataset(dataset):
        raise ConfigurationError(
            f"{dataset!r} is not the name of a dataset: write provider.name with letters, digits, _ and -, "
            "for example tushare.daily"
        )
    provider, _, name = dataset.partition(".")
    return provider, name


def below(root: Path, dataset: str) -> Path:
    """Return the dataset's place in a store's folder; raises `ConfigurationError` for a name that no file can have."""
    if len(dataset) > _LONGEST:
        raise ConfigurationError(
            f"the name of the dataset {dataset[:40]}... has {len(dataset)} characters, and files are named after it: "
            f"give it one of at most {_LONGEST}"
        )
    return root.joinpath(*split(dataset))


def is_dataset(name: str) -> bool:
    """Return whether the name has the form `provider.name`."""
    return _DATASET.fullmatch(name) is not None
