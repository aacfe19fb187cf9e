"""Host names that a server without API keys answers to.

A foreign web page can make its own name lead to this machine (DNS rebinding). A browser then treats the server as part
of that page's site and sends it any request, including deletions and the console's forms. The name is in the Host
header, which a page cannot change, so a server that knows its own names refuses such requests.
"""

from collections.abc import Iterable

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Hosts:
    """Set of host names, compared without port, case and a final dot.

    Args:
        names: Host names or addresses, such as "localhost", "::1" or "shop.internal:8000".
    """

    def __init__(self, names: Iterable[str] = LOOPBACK) -> None:
        self._names = frozenset(map(_bare, names))

    def know(self, host: str) -> bool:
        """Returns whether a Host header names this server."""
        return _bare(host) in self._names


def _bare(host: str) -> str:
    """Removes the port and the brackets of an IPv6 address."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    # An address of several colons and no bracket is IPv6 without a port.
    name = host if host.count(":") > 1 else host.partition(":")[0]
    return name.rstrip(".")
