"""Keeping secrets out of every text that leaves a request: messages, logs, reports.

Who knows a secret tells it to `hide` once; from then on `redact` takes it out in every spelling a request can give it.
What merely looks like a credential (a password in a URL, a parameter named token or apikey) goes too.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

MASK = "***"

_hidden: set[str] = set()
_userinfo = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_parameter = re.compile(
    r"(?i)([?&;\s\"']|^)([\w.-]*(?:token|api[_-]?key|apikey|secret|passw(?:or)?d|signature|auth)[\w.-]*)"
    r"(=|\"\s*:\s*\"|'\s*:\s*')([^&\s\"'#;]+)"
)
_scheme = re.compile(r"(?i)\b(basic|bearer|token)\s+[A-Za-z0-9._~+/=-]{8,}")
_query = re.compile(r"\?[^\s\"']*")


def hide(secrets: Iterable[str]) -> None:
    """Take these values out of every text that `redact` sees in this process."""
    _hidden.update(secret for secret in secrets if secret)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the text with every secret, hidden before or given here, and everything that looks like one, masked."""
    known = {secret for secret in secrets if secret} | _hidden
    for form in sorted({form for secret in known for form in _spellings(secret)}, key=len, reverse=True):
        text = text.replace(form, MASK)
    text = _userinfo.sub(MASK, text)
    text = _parameter.sub(rf"\1\2\3{MASK}", text)
    return _scheme.sub(rf"\1 {MASK}", text)


def _spellings(secret: str) -> set[str]:
    encoded = secret.encode()
    forms = {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    }
    if len(encoded) >= 8:  # a shorter one's encoding would be found everywhere
        forms.add(base64.b64encode(encoded).decode().rstrip("="))
        forms.add(encoded.hex())
    return forms


class RequestLogFilter(logging.Filter):
    """Lets an HTTP library's debug lines pass without queries and secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _query.sub(f"?{MASK}", redact(record.getMessage())), None
        return True
