"""Tell at once that there is no connection to the Hub."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import getproxies, proxy_bypass

_SECONDS = 10.0  # to connect


@contextmanager
def failing_at_once() -> Iterator[None]:
    """Try to connect once before the first request to a server, and fail if it cannot be reached.

    huggingface_hub would try six times, for half a minute and each file. The error is the one of its offline mode, so
    copies in its cache are used. With a proxy nothing is tried, because only the proxy reaches the server.
    """
    from huggingface_hub import get_session

    session, reached = get_session(), set[tuple[str, int]]()

    def check(request: Any) -> None:
        host, scheme = request.url.host, request.url.scheme
        server = host, request.url.port or (443 if scheme == "https" else 80)
        is_behind_proxy = not {scheme, "all"}.isdisjoint(getproxies()) and not proxy_bypass(host)
        if server not in reached and not is_behind_proxy:
            _connect(*server)
            reached.add(server)

    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before["request"], check]}
    try:
        yield
    finally:
        session.event_hooks = before


def _connect(host: str, port: int) -> None:
    """Connect to a server and hang up.

    Raises:
        huggingface_hub.errors.OfflineModeIsEnabled: It cannot be reached.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        socket.create_connection((host, port), _SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        raise OfflineModeIsEnabled(f"{host} cannot be reached ({reason}). Check your connection.") from error
