"""The optserve server: `with Server(Config(listen="127.0.0.1:0")) as server: ...`."""

from optserve_server.config import Config
from optserve_server.server import Server

__all__ = ["Config", "Server"]
