"""`python -m tessera`."""

from tessera.cli.main import main

main()
