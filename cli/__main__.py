"""`python -m cli` is the `marketsync` command."""

from cli.main import main

main()
