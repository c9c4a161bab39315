"""`python -m optserve_server`, and the command `optserve`."""

import sys


def main() -> None:
    """Run the command line; exits with a hint if only the SDK is installed."""
    try:
        from optserve_server.cli import app
    except ModuleNotFoundError as error:
        sys.exit(f"optserve: the command line needs the server's packages; install optserve[server] ({error})")
    app()


if __name__ == "__main__":
    main()
