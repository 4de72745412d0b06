#!/bin/sh
# Writes requirements/*.txt: every package pinned, with the hashes of its files and no address of where they lie.
# The widest lock is resolved first and constrains the others, so that all of them hold the same versions.
# UPGRADE=1 takes the newest versions; otherwise a pin stays as long as it fits.
set -eu
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
lock() {
    out=$1; shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
        --only-binary :all: ${UPGRADE:+--upgrade} "$@" -o "requirements/$out"
}
lock bootstrap.txt requirements/bootstrap.in
lock test.txt pyproject.toml --extra all requirements/test.in
lock all.txt pyproject.toml --extra all -c requirements/test.txt
lock quickstart.txt pyproject.toml -c requirements/test.txt
