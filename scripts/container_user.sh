#!/bin/sh
# The user that the image runs as, who owns /market (what is synced, and the ledger) and nothing else.
set -eu
market=${1:-/market}
id marketsync >/dev/null 2>&1 || useradd --create-home --uid 10001 --shell /usr/sbin/nologin marketsync
mkdir -p "$market"
chown marketsync:marketsync "$market"
