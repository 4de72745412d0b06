"""Secrets are masked in every spelling; what merely looks like one is masked too; the rest stays readable."""

from __future__ import annotations

from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.redaction import redact


@given(st.text(min_size=4, max_size=30).filter(lambda text: text.strip("* ") == text), st.text(max_size=20))
def test_a_known_secret_is_in_no_spelling(secret, around):
    text = f"{around}{secret}{around} {quote(secret, safe='')} {quote_plus(secret)}"
    shown = redact(text, [secret])
    for form in (secret, quote(secret, safe=""), quote_plus(secret)):
        assert form not in shown or form in redact(around, [secret]) or set(form) <= {"*"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET /daily?symbol=AAPL&apikey=abc123&x=1", "GET /daily?symbol=AAPL&apikey=***&x=1"),
        ("GET /daily?api_key=abc HTTP/1.1", "GET /daily?api_key=*** HTTP/1.1"),
        ("postgresql://user:pw@host/db failed", "postgresql://***@host/db failed"),
        ('{"token": "abc", "params": {"limit": 5}}', '{"token": "***", "params": {"limit": 5}}'),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ***"),
        ("the page token is refused", "the page token is refused"),
        ("AAPL 2026-03-04 close 1.5", "AAPL 2026-03-04 close 1.5"),
    ],
)
def test_what_looks_like_a_credential_is_masked_and_the_rest_is_not(text, shown):
    assert redact(text) == shown


def test_the_longer_of_two_secrets_is_masked_whole():
    assert redact("abcdef abc", ["abc", "abcdef"]) == "*** ***"
