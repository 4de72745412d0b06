"""Frames to JSON as bytes, in one pass of polars: an array of objects, or an array of arrays in column order.

Numbers keep their shortest exact form, nulls are null, dates are ISO text.
"""

from __future__ import annotations

import json

import polars as pl


def objects(rows: pl.DataFrame) -> bytes:
    """[{"column": value, ...}, ...]"""
    return b"[" + rows.write_ndjson().rstrip("\n").replace("\n", ",").encode() + b"]"


def arrays(rows: pl.DataFrame) -> bytes:
    """[[value, ...], ...]"""
    if rows.height == 0:
        return b"[]"
    texts = rows.select(pl.col(pl.String))
    # CSV and JSON quote alike until a text holds a quote, a backslash or a control character.
    if texts.width and texts.select(pl.any_horizontal(pl.all().str.contains(r'["\\\x00-\x1f]')).any()).item():
        return json.dumps(rows.rows(), default=str, ensure_ascii=False).encode()
    lines = rows.write_csv(include_header=False, quote_style="non_numeric", null_value="null")
    return b"[[" + lines.rstrip("\n").replace("\n", "],[").encode() + b"]]"
