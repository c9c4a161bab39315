"""`python -m optserve_server`, and the command `optserve`."""

from optserve_server.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
