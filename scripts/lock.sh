#!/bin/sh
# Writes the locks: every package pinned, with the hashes of its files and no address of where they lie.
# The widest lock is resolved first and constrains the others, so that all of them hold the same versions.
# UPGRADE=1 takes the newest versions; otherwise a pin stays as long as it fits.
set -eu
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
lock() {
    out=$1; shift
    "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
        --only-binary :all: ${UPGRADE:+--upgrade} "$@" -o "$out"
}
lock requirements/bootstrap.txt requirements/bootstrap.in
lock requirements/test.txt pyproject.toml --extra all requirements/test.in
lock requirements/all.txt pyproject.toml --extra all -c requirements/test.txt
lock requirements/quickstart.txt pyproject.toml -c requirements/test.txt
lock benchmarks/requirements-dlt.txt benchmarks/requirements-dlt.in -c requirements/bootstrap.txt
