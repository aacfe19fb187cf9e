"""The choice of the client of Kafka, and its connection options."""

from pathlib import Path
from typing import Any

import pytest

from features.errors import LogError
from streaming.log.client import Membership
from streaming.log.kafka import clients
from streaming.log.kafka.client import PromptConnections
from streaming.log.kafka.clients import client_of
from streaming.log.kafka.options import as_librdkafka, without_counterpart
from streaming.log.librdkafka.client import LibrdkafkaClient
from streaming.log.librdkafka.transaction import packed
from tessera.settings import Settings

ADDRESS = "127.0.0.1:1"


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "find_spec", lambda name: None)


def test_auto_takes_librdkafka_and_a_name_takes_that_client() -> None:
    for name, expected in {"auto": "librdkafka", "librdkafka": "librdkafka", "kafka-python": None}.items():
        found, fault = client_of(name, ADDRESS, {})
        assert (found and found.name, fault) == (expected, "")


@pytest.mark.usefixtures("without_package")
def test_without_the_package_auto_says_why_and_the_name_is_refused_with_the_extra() -> None:
    assert client_of("auto", ADDRESS, {}) == (
        None,
        "confluent-kafka is not installed; pip install 'tessera[librdkafka]'",
    )
    with pytest.raises(LogError, match=r"tessera\[librdkafka\]', or set TESSERA_KAFKA_CLIENT=kafka-python"):
        client_of("librdkafka", ADDRESS, {})
    with pytest.raises(LogError, match="expected one of auto, kafka-python, librdkafka"):
        client_of("librdkaffa", ADDRESS, {})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sasl_mechanism": "GSSAPI", "client_id": "a"}, "sasl_mechanism=GSSAPI"),
        ({"sasl_kerberos_name": "a", "ssl_context": object()}, "sasl_kerberos_name, ssl_context"),
        ({"proxy_url": "socks5://a:1"}, "proxy_url"),
    ],
)
def test_an_option_that_librdkafka_lacks_keeps_kafka_python_and_is_named(options: dict[str, Any], named: str) -> None:
    found, fault = client_of("auto", ADDRESS, options)
    assert found is None
    assert f"no counterpart of {named};" in fault
    with pytest.raises(LogError, match=named):
        client_of("librdkafka", ADDRESS, options)


def test_options_of_the_environment_reach_librdkafka_in_its_names(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "TESSERA_HOME": str(tmp_path),
            "TESSERA_KAFKA_CLIENT": "librdkafka",
            "TESSERA_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "TESSERA_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "TESSERA_KAFKA_SASL_PLAIN_USERNAME": "me",
            "TESSERA_KAFKA_SASL_PLAIN_PASSWORD": "secret",
            "TESSERA_KAFKA_SSL_CHECK_HOSTNAME": "false",
            "TESSERA_KAFKA_REQUEST_TIMEOUT_MS": "1000",
        }
    )
    assert settings.kafka_client == "librdkafka"
    assert without_counterpart(settings.kafka_options) == []
    assert as_librdkafka(settings.kafka_options) == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanisms": "SCRAM-SHA-512",
        "sasl.username": "me",
        "sasl.password": "secret",
        "ssl.endpoint.identification.algorithm": "none",
    }
    assert as_librdkafka({"ssl_check_hostname": True, "ssl_crlfile": None}) == {
        "ssl.endpoint.identification.algorithm": "https"
    }


def test_librdkafka_accepts_every_option_that_is_translated_for_it(tmp_path: Path) -> None:
    options = {
        "client_id": "a",
        "connections_max_idle_ms": "60000",
        "max_in_flight_requests_per_connection": "5",
        "metadata_max_age_ms": "60000",
        "receive_buffer_bytes": "65536",
        "reconnect_backoff_max_ms": "1000",
        "reconnect_backoff_ms": "50",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_password": "secret",
        "sasl_plain_username": "me",
        "security_protocol": "SASL_PLAINTEXT",
        "send_buffer_bytes": "65536",
        "ssl_check_hostname": "true",
    }
    client = LibrdkafkaClient(ADDRESS, as_librdkafka(options))
    reader = client.sole_reader([("topic", 0)], group="group", start=None)
    assert reader.membership() == Membership("group")
    reader.close()


@pytest.mark.parametrize("group", ["group", "größe 日本", "a" * 200])
def test_a_membership_has_librdkafkas_own_bytes(group: str) -> None:
    reader = LibrdkafkaClient(ADDRESS, {}).sole_reader([("topic", 0)], group=group, start=None)
    assert packed(reader.membership()) == reader._consumer.consumer_group_metadata()
    reader.close()
    assert packed(Membership("g", 7, "m")) == b"CGMDv2:\x07\x00\x00\x00g\x00m\x00\x01"


def test_a_consumer_asks_for_its_topic_as_soon_as_for_anything_else() -> None:
    connections = PromptConnections(bootstrap_servers="127.0.0.1:1", retry_backoff_ms=7)
    try:
        assert connections.cluster.refresh_backoff() == 7
    finally:
        connections.close()
