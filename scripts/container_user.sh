#!/bin/sh
# Makes the user that the image runs as, who owns /market (what is synced, and the ledger) and a Prefect server's home.
set -eu
market=${1:-/market}
id marketsync >/dev/null 2>&1 || useradd --create-home --uid 10001 --shell /usr/sbin/nologin marketsync
mkdir -p "$market" /home/marketsync/prefect
chown marketsync:marketsync "$market" /home/marketsync/prefect
