"""`python -m providers.replica`: the replica as a process of its own; prints its URL on the first line and serves."""

from __future__ import annotations

import argparse
import sys

from marketsync.errors import ConfigurationError
from providers.replica.server import Replica


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 then, 2 when an option is wrong."""
    parser = argparse.ArgumentParser(prog="python -m providers.replica", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 (default) takes a free one")
    parser.add_argument("--data", help="bokeh (default) or generated:ROWS[xSYMBOLS][:1Day|1Min][:YYYY-MM-DD]")
    parser.add_argument("--faults", help="YAML or JSON: a list of fault rules, or a mapping of any replica options")
    parser.add_argument("--log", help="file to append one JSON object a request to")
    parser.add_argument("--limits", help="a tier for every provider; 'unlimited' for no limits")
    parser.add_argument("--delay", type=float, nargs=2, metavar=("LEAST", "MOST"), help="seconds added to each answer")
    parser.add_argument("--seed", type=int, help="seed of delays and fault probabilities (default 0)")
    parser.add_argument("--until", help="newest published session, an instant with a zone, or 'clock'")
    options = vars(parser.parse_args(arguments))
    try:
        replica = Replica(**options)
        url = replica.start()
    except ConfigurationError as why:
        sys.stderr.write(f"{why}\n")
        return why.exit_code
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()
    replica.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
