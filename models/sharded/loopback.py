"""The interface at which only this machine listens, for gloo in processes of one machine.

gloo listens at the address of the machine's name, unless its variable names another interface.
"""

import socket

INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable of a process that names the interface at which its gloo listens and calls."""


def loopback() -> str:
    """Returns the name of this machine's loopback interface: `lo` on Linux, `lo0` on BSD and macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
