"""A file that sets a replica up: the constructor's options in YAML or JSON, or only a list of fault rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marketsync.errors import ConfigurationError

KEYS = ("data", "faults", "limits", "accounts", "delay", "seed", "until", "cache_bytes", "export_polls")


def read(path: str | Path) -> dict[str, Any]:
    """Options of `Replica` in the file at `path`: a mapping with any of `KEYS`, or a list, taken as `faults`."""
    from ruamel.yaml import YAML, YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(Path(path))
    except OSError as why:
        raise ConfigurationError(f"replica: cannot read {path}: {why.strerror}; give an existing file") from why
    except YAMLError as why:
        raise ConfigurationError(f"replica: {path} is not valid YAML: {why}") from why
    if content is None:
        return {}
    if isinstance(content, list):
        return {"faults": content}
    if not isinstance(content, dict) or set(content) - set(KEYS):
        raise ConfigurationError(f"replica: {path} holds neither a list of faults nor a mapping of {', '.join(KEYS)}")
    return content
