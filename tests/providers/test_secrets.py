"""Where a secret is looked up, what is said when it has no value, and that it appears in no text afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from marketsync.errors import ConfigurationError, SecretMissing
from providers.secrets import Secrets


def test_the_environment_comes_first_then_a_named_file_then_the_mount_then_the_folder(tmp_path: Path) -> None:
    mounted, base = tmp_path / "run", tmp_path / "base"
    (base / ".secrets").mkdir(parents=True)
    mounted.mkdir()
    pointed = tmp_path / "pointed"
    environment = {"KEY": "from-environment", "KEY_FILE": str(pointed)}
    for path, text in ((pointed, "from-file\n"), (mounted / "KEY", "from-mount"), (base / ".secrets/KEY", "from-base")):
        path.write_text(text)

    def found() -> str:
        return Secrets(base, environment=environment, mounted=mounted).get("KEY")

    assert found() == "from-environment"
    del environment["KEY"]
    assert found() == "from-file"
    del environment["KEY_FILE"]
    assert found() == "from-mount"
    (mounted / "KEY").unlink()
    assert found() == "from-base"


def test_a_missing_secret_says_where_to_put_it(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, environment={}, mounted=tmp_path / "none")
    with pytest.raises(SecretMissing) as raised:
        secrets.get("ALPACA_KEY_ID")
    assert "environment variable ALPACA_KEY_ID" in str(raised.value)
    assert str(tmp_path / ".secrets" / "ALPACA_KEY_ID") in str(raised.value)
    assert isinstance(raised.value, ConfigurationError)
    assert list(secrets.missing(["ALPACA_KEY_ID"])) == ["ALPACA_KEY_ID"]


def test_an_empty_value_is_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "KEY").write_text("\n")
    with pytest.raises(SecretMissing):
        Secrets(tmp_path, environment={"KEY": ""}, mounted=tmp_path / "none").get("KEY")


def test_a_file_that_is_named_and_not_there_is_told_and_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".secrets").mkdir()
    (tmp_path / ".secrets" / "KEY").write_text("old")
    secrets = Secrets(tmp_path, environment={"KEY_FILE": str(tmp_path / "typo")}, mounted=tmp_path / "none")
    with pytest.raises(SecretMissing, match="which KEY_FILE names"):
        secrets.get("KEY")


def test_filling_replaces_every_secret_and_nothing_else(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, environment={"USER": "me", "PW": "s3cr3t-word"})
    assert secrets.fill("postgresql://$secret.USER:$secret.PW@host/$db") == "postgresql://me:s3cr3t-word@host/$db"


def test_a_secret_in_a_url_may_hold_what_has_a_meaning_there(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, environment={"PW": "p@ss/w:rd#%", "URL": "postgresql://me@host/db"})
    assert secrets.fill_url("postgresql://me:$secret.PW@host/db") == "postgresql://me:p%40ss%2Fw%3Ard%23%25@host/db"
    assert secrets.fill_url("$secret.URL") == "postgresql://me@host/db"


def test_what_was_looked_up_is_in_no_text_any_more(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path, environment={"PW": "s3cr3t/word+1"})
    value = secrets.get("PW")
    assert value not in secrets.redact(f"refused: {value}")
    assert "s3cr3t%2Fword%2B1" not in secrets.redact("GET /x?p=s3cr3t%2Fword%2B1")
    assert value not in repr(secrets)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8"), (b"a\r\nX-Admin: 1", "more than one line")],
)
def test_a_file_that_holds_no_key_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / ".secrets" / "KEY"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(SecretMissing, match=why) as caught:
        Secrets(tmp_path, environment={}, mounted=tmp_path / "none").get("KEY")
    assert str(file) in str(caught.value)
