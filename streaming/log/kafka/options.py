"""Translates connection options of kafka-python to librdkafka's names."""

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "client_id": "client.id",
    "connections_max_idle_ms": "connections.max.idle.ms",
    "max_in_flight_requests_per_connection": "max.in.flight.requests.per.connection",
    "metadata_max_age_ms": "metadata.max.age.ms",
    "receive_buffer_bytes": "socket.receive.buffer.bytes",
    "reconnect_backoff_max_ms": "reconnect.backoff.max.ms",
    "reconnect_backoff_ms": "reconnect.backoff.ms",
    "sasl_mechanism": "sasl.mechanisms",
    "sasl_plain_password": "sasl.password",
    "sasl_plain_username": "sasl.username",
    "security_protocol": "security.protocol",
    "send_buffer_bytes": "socket.send.buffer.bytes",
    "ssl_cafile": "ssl.ca.location",
    "ssl_certfile": "ssl.certificate.location",
    "ssl_check_hostname": "ssl.endpoint.identification.algorithm",
    "ssl_crlfile": "ssl.crl.location",
    "ssl_keyfile": "ssl.key.location",
    "ssl_password": "ssl.key.password",
}
# Options of the calls that stay with kafka-python.
_IGNORED = {"api_version", "bootstrap_timeout_ms", "request_timeout_ms", "retry_backoff_ms"}
_MECHANISMS = {"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"}
_NO = {"", "0", "false", "no", "off"}


def without_counterpart(options: Mapping[str, Any]) -> list[str]:
    """Returns the names of options that librdkafka lacks, or whose value it lacks."""
    names = [name for name in options if name not in _NAMES and name not in _IGNORED]
    mechanism = options.get("sasl_mechanism")
    if mechanism is not None and mechanism not in _MECHANISMS:
        names.append(f"sasl_mechanism={mechanism}")
    return sorted(names)


def as_librdkafka(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options in librdkafka's names. Options without a value have librdkafka's default."""
    found = {_NAMES[name]: value for name, value in options.items() if name in _NAMES and value is not None}
    algorithm = _NAMES["ssl_check_hostname"]
    if algorithm in found:
        found[algorithm] = "none" if str(found[algorithm]).lower() in _NO else "https"
    return found
