"""The Prefect flows: each strings the steps of `tasks/` and nothing else. The only package that imports prefect."""

import os

# Prefect reads these when it is imported, which the modules of this package do. Nothing of ours reports to anybody, and
# the stock 20 s are too few for the first start of the server that a command without a server starts for itself.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(_name, _value)
