"""Metrics are served at a port of this machine, or at an address that is named."""

import httpx
import pytest

from features.errors import StreamError
from streaming.metrics import StreamMetrics
from tests.servers import free_port


def test_metrics_answer_at_the_place_that_is_named() -> None:
    for form in ("{}", "127.0.0.1:{}", "0.0.0.0:{}"):
        port = free_port()
        StreamMetrics().serve(form.format(port))
        assert "tessera_batches_total 0.0" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        with pytest.raises(StreamError, match=rf"^--metrics-port {form.format(port)}: .*; choose another port or host"):
            StreamMetrics().serve(form.format(port))
    StreamMetrics().serve("0")


@pytest.mark.parametrize("place", ["", "x", "host:", "-1", "65536", "1.2.3.4:x"])
def test_a_place_that_is_no_port_is_refused(place: str) -> None:
    with pytest.raises(StreamError, match=f"^--metrics-port {place}: expected PORT or HOST:PORT"):
        StreamMetrics().serve(place)
