#!/bin/sh
# Puts the deployments of prefect.yaml on the Prefect server at PREFECT_API_URL, and the work pool that they run in.
set -eu
: "${PREFECT_API_URL:?set it to the address of the server, such as http://127.0.0.1:4200/api (make server)}"
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
# a pool that is there already keeps what somebody changed in it
prefect work-pool inspect marketsync >/dev/null 2>&1 || prefect --no-prompt work-pool create marketsync --type process
exec prefect --no-prompt deploy --all
