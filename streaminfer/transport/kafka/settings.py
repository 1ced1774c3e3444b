"""How to reach a Kafka cluster, and for how long to wait for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aiokafka.helpers import create_ssl_context

from streaminfer.errors import ConfigError

__all__ = ["KafkaSettings"]

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Times are in seconds, sizes in bytes.

    Raises:
        ConfigError: an unknown security protocol, a user without password, bad timeouts.
    """

    bootstrap: str  # host:port[,host:port…]
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None  # PLAIN; or SCRAM-SHA-256, SCRAM-SHA-512
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: str | None = None  # None: the system's authorities
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool = True
    connect_timeout: float = 10.0
    request_timeout: float = 40.0
    session_timeout: float = 30.0  # a worker silent for so long is dead to its group
    rebalance_timeout: float = 60.0  # to finish and commit before partitions move
    max_poll_interval: float = 600.0  # a worker that neither polls nor calls keepalive is out
    close_timeout: float = 10.0  # for each step of closing: flush, revoke, disconnect
    partition_fetch_bytes: int = 1 << 20  # more stalls the event loop while it is parsed
    fetch_bytes: int = 16 << 20
    fetch_wait: float = 0.1
    max_record_bytes: int = 1_048_576  # more needs a topic that takes it
    replication: int = -1  # of topics made here; -1: the cluster's default

    def __post_init__(self) -> None:
        if not self.bootstrap:
            raise ConfigError("no Kafka address", where="kafka.bootstrap", hint="host:port")
        if self.security_protocol not in _PROTOCOLS:
            raise ConfigError(
                f"unknown security protocol {self.security_protocol!r}",
                where="kafka.security_protocol",
                hint=f"one of {', '.join(_PROTOCOLS)}",
            )
        if self.sasl and not (self.sasl_username and self.sasl_password):
            raise ConfigError(
                f"{self.security_protocol} needs a user and a password",
                where="kafka.sasl_username",
                hint="set KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD",
            )
        if self.request_timeout <= self.fetch_wait or self.session_timeout <= 0:
            raise ConfigError("a timeout is too short", where="kafka.request_timeout")

    @property
    def sasl(self) -> bool:
        """Whether a user logs in."""
        return self.security_protocol.startswith("SASL")

    @property
    def patience(self) -> float:
        """Seconds after which a consumer that makes no progress at all counts as stuck."""
        return 2 * self.session_timeout + self.rebalance_timeout

    def client(self, client_id: str) -> dict[str, Any]:
        """Return the arguments that every client of aiokafka takes.

        Raises:
            ConfigError: a certificate or key file is missing or is none.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap.split(","),
            "client_id": client_id,
            "request_timeout_ms": round(self.request_timeout * 1000),
            "security_protocol": self.security_protocol,
        }
        if self.sasl:
            options["sasl_mechanism"] = self.sasl_mechanism or "PLAIN"
            options["sasl_plain_username"] = self.sasl_username
            options["sasl_plain_password"] = self.sasl_password
        if self.security_protocol.endswith("SSL"):
            options["ssl_context"] = self._tls()
        return options

    def _tls(self) -> Any:
        try:
            context = create_ssl_context(
                cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
            )
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"cannot load the TLS files: {error}",
                where="kafka.ssl_cafile",
                hint="PEM files; the key without a password",
            ) from error
        context.check_hostname = self.ssl_check_hostname
        return context
