"""Entry point of the command `tessera` and of `python -m tessera`."""

import sys

from tessera.install import check_names, leave_working_directory


def main() -> None:
    """Runs the command line. A name clash is one line on standard error and exit status 2."""
    leave_working_directory(started_as_module=sys.argv[0].endswith("__main__.py"))
    try:
        check_names()
    except ImportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    from tessera.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
