#!/bin/sh
# Puts the deployments of prefect.yaml on the Prefect server at PREFECT_API_URL, and the work pool that they run in.
set -eu
: "${PREFECT_API_URL:?set it to the address of the server, such as http://127.0.0.1:4200/api (make server)}"
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
prefect work-pool create marketsync --type process --overwrite
exec prefect --no-prompt deploy --all
