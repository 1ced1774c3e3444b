"""A real Kafka broker for tests and benchmarks: one KRaft node from Maven's jars, on free ports.

    with Broker.running() as broker:      python -m tests.broker
        broker.address                    127.0.0.1:40123   (runs until SIGTERM)

`kill()` is kill -9 and `start()` after it finds the same log: what was acknowledged must be there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

__all__ = ["Broker", "Unavailable", "jars"]

ROOT = Path(__file__).resolve().parents[1]
JARS = ROOT / "build" / "kafka-4.1.0"
JAVA = 17  # the oldest that Kafka 4 runs on
READY = 60.0  # seconds a broker may take to answer; 3 on an idle machine

# A fast start, a fast first join, and after kill -9 not the old session's 9 s but 1.5 s to wait.
PROPERTIES: Mapping[str, str] = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL",
    "auto.create.topics.enable": "false",
    "broker.heartbeat.interval.ms": "300",
    "broker.session.timeout.ms": "1500",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    "num.partitions": "1",
    "offsets.topic.num.partitions": "4",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.replication.factor": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
}
# The files of an empty log by name, of brokers with such properties of their own.
_FORMATTED: dict[tuple[tuple[str, str], ...], Mapping[str, bytes]] = {}


class Unavailable(Exception):
    """There is no way to run a broker here; the text says what is missing."""


class Broker:
    """One broker process and its folder. Not started yet; every method blocks (use a thread).

    `properties` are added to `PROPERTIES`; settings of a listener `sasl_ssl` open one on
    `secure_address`.
    """

    def __init__(self, folder: Path, properties: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._class_path = f"{jars()}/*"
        self._properties = tuple(sorted((properties or {}).items()))
        plain, secure, controller = (f"127.0.0.1:{port}" for port in _free_ports(3))
        self.address, self.secure_address = plain, secure
        listeners = f"PLAINTEXT://{plain}"
        if properties and any(name.startswith("listener.name.sasl_ssl.") for name in properties):
            listeners += f",SASL_SSL://{secure}"
        settings = {
            **PROPERTIES,
            "listeners": f"{listeners},CONTROLLER://{controller}",
            "advertised.listeners": listeners,
            "controller.quorum.voters": f"1@{controller}",
            "log.dirs": str(folder / "data"),
            **(properties or {}),
        }
        self._config = folder / "server.properties"
        self._config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextmanager
    def running(cls, properties: Mapping[str, str] | None = None) -> Iterator[Self]:
        """Run a broker in a folder of its own; both are gone at the end."""
        with ExitStack() as stack:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="kafka-", ignore_cleanup_errors=True)
            )
            broker = cls(Path(folder), properties)
            stack.callback(broker.stop)
            broker.start()
            yield broker

    def start(self) -> None:
        """Start it, for the first time or again, and wait until it has stored a record."""
        if not (self.folder / "data").exists():
            self._format()
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._config)), stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "broker.log").read_text(errors="replace")[-2000:]
                raise Unavailable(f"the broker does not come up:\n{tail}")
            time.sleep(0.1)

    def _format(self) -> None:
        """Make an empty log: with Kafka's tool, which is a JVM of its own, or as it made one."""
        data = self.folder / "data"
        if made := _FORMATTED.get(self._properties):
            data.mkdir()
            for name, content in made.items():
                (data / name).write_bytes(content)
            return
        # The first byte 0 makes it start with A: a leading dash would be taken for an option.
        cluster = urlsafe_b64encode(bytes(1) + uuid.uuid4().bytes[1:]).decode().rstrip("=")
        tool = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(self._config)]
        done = subprocess.run(self._java(*tool), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cannot format the log:\n{done.stdout}{done.stderr}")
        _FORMATTED[self._properties] = {file.name: file.read_bytes() for file in data.iterdir()}

    def kill(self) -> None:
        """End it with SIGKILL: no flush, no goodbye."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Stop it with SIGSTOP: connections stay open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # on a busy machine its last thread could answer once more
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status

    def thaw(self) -> None:
        """Let it go on after freeze()."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, gently if it lets us."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def _java(self, *arguments: str) -> list[str]:
        quick = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
        return ["java", "-Xms128m", "-Xmx512m", *quick, "-cp", self._class_path, *arguments]

    def _answers(self) -> bool:
        # In a thread of its own: the caller may have a running loop.
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(asyncio.run(_stores(self.address))))
        thread.start()
        thread.join()
        return answers == [True]


async def _stores(address: str) -> bool:
    """Say whether the broker keeps a record: a listening port alone means nothing yet."""
    host, port = address.split(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            pass
        admin = AIOKafkaAdminClient(bootstrap_servers=address, request_timeout_ms=3000)
        producer = AIOKafkaProducer(bootstrap_servers=address, request_timeout_ms=3000)
        try:
            await admin.start()
            await admin.create_topics([NewTopic("ready", 1, 1)])
            await producer.start()
            await asyncio.wait_for(producer.send_and_wait("ready", b"?"), 5)
        finally:
            await producer.stop()
            await admin.close()
    except (OSError, KafkaError, TimeoutError):
        return False
    return True


def jars() -> Path:
    """Return the folder of the broker's jars, fetched with Maven once. Raises Unavailable."""
    _check_java()
    JARS.parent.mkdir(exist_ok=True)
    with JARS.with_name(JARS.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once fetch once
        if not JARS.exists():
            _fetch()
    return JARS


def _fetch() -> None:
    if shutil.which("mvn") is None:
        raise Unavailable(
            "no Maven (mvn) to fetch Kafka's jars with, and none in build/kafka-4.1.0"
        )
    part = JARS.with_name(JARS.name + ".part")
    command = ["mvn", "-q", "-B", "-f", str(ROOT / "tests" / "pom.xml")]
    command += ["dependency:copy-dependencies", f"-DoutputDirectory={part}"]
    for _ in range(2):  # a mirror's hiccup is no reason to go without
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            part.rename(JARS)  # whole or not at all
            return
    raise Unavailable(f"Maven could not fetch Kafka's jars:\n{(done.stdout + done.stderr)[-2000:]}")


def _check_java() -> None:
    if shutil.which("java") is None:
        raise Unavailable(f"no Java (≥ {JAVA}) to run Kafka with")
    text = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    match = re.search(r'version "(\d+)', text)
    if match is None or int(match[1]) < JAVA:
        raise Unavailable(f"Kafka 4 needs Java ≥ {JAVA}; here is: {text.splitlines()[0]}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def main() -> None:
    """Print the address and serve until SIGTERM or SIGINT."""
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    with Broker.running() as broker:
        sys.stdout.write(f"{broker.address}\n")
        sys.stdout.flush()
        parent = os.getppid()
        while not done.wait(0.2) and os.getppid() == parent:  # an orphan serves nobody
            pass


if __name__ == "__main__":
    main()
