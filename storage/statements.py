"""Which SQL is a question: one statement that reads. Every store asks here before an engine sees the text, so that
`query` can change nothing, whatever the engine would allow."""

from __future__ import annotations

import re

from marketsync.errors import QueryRefused

READS = ("SELECT", "WITH", "FROM", "VALUES", "SHOW", "DESCRIBE", "DESC", "EXPLAIN")
_LONGEST_SHOWN = 60
# what is no part of the statement's words: literals, quoted names, comments
_QUOTED = r"'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.|\"\")*\"|`[^`]*`|/\*.*?\*/"
SILENT = re.compile(rf"{_QUOTED}|--[^\n]*", re.DOTALL)
# to MySQL two dashes before anything but a space are two minus signs, and # begins a comment
MYSQL_SILENT = re.compile(rf"{_QUOTED}|--(?=[\x00-\x20\x7f]|\Z)[^\n]*|#[^\n]*", re.DOTALL)
# `WITH ... INSERT`, `EXPLAIN ... DELETE` and `SELECT ... INTO OUTFILE` begin like a question
_CHANGES = re.compile(
    r"\b(?:INSERT\s+INTO|INTO\s+(?:OUTFILE|DUMPFILE)|DELETE\s+FROM|UPDATE\s+[\w.\"`]+\s+SET|"
    r"(?:CREATE|DROP|ALTER|TRUNCATE|ATTACH|DETACH|RENAME|EXCHANGE|OPTIMIZE)\s+"
    r"(?:OR\s+REPLACE\s+)?(?:TEMPORARY\s+)?(?:TABLE|VIEW|DATABASE|FUNCTION|DICTIONARY|USER|ROLE))\b",
    re.IGNORECASE,
)


def question(sql: str, silent: re.Pattern[str] = SILENT) -> str:
    """Return the statement without what ends it; raises `QueryRefused` unless it is one statement that only reads.
    `silent` finds literals, quoted names and comments, as the engine has them."""
    # a quoted part stays a word of its own, so that names around it do not grow together
    words = silent.sub(lambda found: " x " if found[0][0] in "'\"`" else " ", sql)
    shown = " ".join(sql.split())
    shown = shown if len(shown) <= _LONGEST_SHOWN else shown[: _LONGEST_SHOWN - 3] + "..."
    first = re.match(r"[\s(]*([A-Za-z]*)", words)
    if first is None or first[1].upper() not in READS:
        raise QueryRefused(
            f"this is no question: {shown!r} does not begin with SELECT (or {', '.join(READS[1:])}); a query only "
            "reads, rows are changed by a sync"
        )
    if words.rstrip().rstrip(";").count(";"):
        raise QueryRefused(f"this is more than one statement: {shown!r}; ask one at a time")
    if changing := _CHANGES.search(words):
        raise QueryRefused(f"this is no question: it says {' '.join(changing[0].split())}; a query only reads")
    return sql.strip().rstrip(";").rstrip()
