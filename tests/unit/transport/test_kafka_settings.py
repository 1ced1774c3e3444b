"""What a user types about Kafka reaches aiokafka, and what is wrong is said before connecting."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from streaminfer.errors import ConfigError
from streaminfer.transport.kafka import KafkaSettings


def test_password_is_in_no_log() -> None:
    settings = KafkaSettings("k:1", "SASL_SSL", sasl_username="u", sasl_password="s3cret")  # noqa: S106
    assert "s3cret" not in repr(settings)
    assert settings.client("x")["sasl_plain_password"] == "s3cret"  # noqa: S105


def test_several_brokers_may_be_named() -> None:
    options = KafkaSettings("a:1,b:2", request_timeout=7.5).client("worker-3")
    assert options["bootstrap_servers"] == ["a:1", "b:2"]
    assert options["request_timeout_ms"] == 7500
    assert options["client_id"] == "worker-3"
    assert "ssl_context" not in options
    assert "sasl_plain_username" not in options


def test_tls_is_checked_unless_told_otherwise() -> None:
    strict = KafkaSettings("k:1", "SSL").client("x")["ssl_context"]
    assert strict.check_hostname
    assert strict.verify_mode is ssl.CERT_REQUIRED
    loose = KafkaSettings("k:1", "SSL", ssl_check_hostname=False).client("x")["ssl_context"]
    assert not loose.check_hostname
    assert loose.verify_mode is ssl.CERT_REQUIRED, "another name is not another authority"


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"bootstrap": ""}, "kafka.bootstrap"),
        ({"bootstrap": "k:1", "security_protocol": "TLS"}, "kafka.security_protocol"),
        ({"bootstrap": "k:1", "security_protocol": "SASL_SSL"}, "kafka.sasl_username"),
        (
            {"bootstrap": "k:1", "security_protocol": "SASL_PLAINTEXT", "sasl_username": "u"},
            "kafka.sasl_username",
        ),
    ],
)
def test_wrong_settings_name_their_key(arguments: dict[str, str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KafkaSettings(**arguments)  # type: ignore[arg-type]
    assert caught.value.where == where


def test_missing_certificate_is_a_config_error(tmp_path: Path) -> None:
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate")
    for path in (broken, tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match="TLS"):
            KafkaSettings("k:1", "SSL", ssl_cafile=str(path)).client("x")
