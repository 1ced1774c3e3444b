"""Kafka's administration: topics, other groups' commits, the ends of logs, and trimming them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaPartition
from aiokafka import errors as kafka
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from streaminfer.errors import NotOwner, TopicError, TransportError
from streaminfer.transport.base import Commit, TopicInfo, TopicPartition, TopicSpec
from streaminfer.transport.kafka import lifecycle
from streaminfer.transport.kafka.border import translated
from streaminfer.transport.kafka.offsets import NOBODY, Offsets
from streaminfer.transport.kafka.settings import KafkaSettings

__all__ = ["KafkaAdmin"]

_SET_ON_TOPIC = 1  # DescribeConfigs' source DYNAMIC_TOPIC_CONFIG


class KafkaAdmin:
    """See `transport.base.Admin`."""

    def __init__(self, settings: KafkaSettings, client_id: str) -> None:
        self._settings, self._client_id = settings, client_id
        self._clients: tuple[Any, Any] | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Connect. Raises TransportError naming the address."""
        settings = self._settings
        options = settings.client(self._client_id)
        admin = AIOKafkaAdminClient(**options)
        reader = AIOKafkaConsumer(**options, enable_auto_commit=False)
        limit = settings.close_timeout
        self._stack.push_async_callback(lambda: lifecycle.stop(admin.close(), admin._client, limit))
        self._stack.push_async_callback(
            lambda: lifecycle.stop(reader.stop(), reader._client, limit)
        )
        try:
            for start in (admin.start, reader.start):
                await lifecycle.connect(start, settings.bootstrap, settings.connect_timeout)
        except BaseException:
            await self._stack.aclose()
            raise
        self._clients = admin, reader
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect. Never hangs."""
        self._clients = None
        await self._stack.aclose()

    @property
    def _admin(self) -> Any:
        return self._opened()[0]

    @property
    def _reader(self) -> Any:
        """A consumer that reads nothing: it knows how to ask for the ends of logs."""
        return self._opened()[1]

    def _opened(self) -> tuple[Any, Any]:
        if self._clients is None:
            raise TransportError("this admin is not open; use it in `async with`")
        return self._clients

    async def topics(self, names: Collection[str]) -> dict[str, TopicInfo]:
        """Describe the topics that exist among `names`; `config` has the defaults too."""
        with translated("describe topics"):
            counts = await lifecycle.partition_counts(self._admin._client, names)
            configs = await self._configs(list(counts), every=True)
        return {name: TopicInfo(counts[name], configs[name]) for name in configs}

    async def create(self, topics: Collection[TopicSpec]) -> None:
        """Create topics and wait until they are there. Raises TopicError."""
        if not topics:
            return
        replicas = self._settings.replication
        anywhere: dict[int, list[int]] | None = (
            {} if replicas == -1 else None
        )  # how aiokafka spells "the cluster's default"
        new = [NewTopic(t.name, t.partitions, replicas, anywhere, dict(t.config)) for t in topics]
        with translated("create topics"):
            reply = await self._admin.create_topics(new)
            _check(reply.topic_errors, kafka.TopicAlreadyExistsError, "create")
            await lifecycle.require_topics(
                self._admin._client, [t.name for t in topics], self._settings.request_timeout
            )

    async def configure(self, name: str, config: Mapping[str, str]) -> None:
        """Set these configuration entries of a topic; others stay. Raises TopicError."""
        with translated(f"configure topic {name}"):
            # aiokafka has only the AlterConfigs that replaces everything: read, merge, write.
            present = await self._configs([name], every=False)
            if name not in present:
                raise TopicError(f"no topic {name}; make it: streaminfer topics apply PIPELINE")
            entries = {**present[name], **config}
            resource = ConfigResource(ConfigResourceType.TOPIC, name, entries)
            for reply in await self._admin.alter_configs([resource]):
                _check(
                    [(name, code, text) for code, text, *_ in reply.resources], None, "configure"
                )

    async def delete(self, names: Collection[str]) -> None:
        """Delete topics and wait until they are gone; one that is missing is no error."""
        if not names:
            return
        client = self._admin._client
        with translated("delete topics"):
            reply = await self._admin.delete_topics(list(names))
            _check(reply.topic_error_codes, kafka.UnknownTopicOrPartitionError, "delete")
            await lifecycle.require_gone(client, names, self._settings.request_timeout)

    async def committed(
        self, group: str, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, Commit | None]:
        """Read a group's commits. None only where the broker says that there is none."""
        with translated(f"read what group {group} has committed"):
            offsets = Offsets(self._admin._client, group)
            return await offsets.read(partitions, self._settings.request_timeout)

    async def commit(self, group: str, commits: Mapping[TopicPartition, Commit]) -> None:
        """Write commits for a group that has no members. Raises NotOwner if it has some."""
        offsets = Offsets(self._admin._client, group)
        with translated(f"commit for group {group}"):
            try:
                await offsets.write(commits, NOBODY, self._settings.request_timeout)
            except kafka.UnknownMemberIdError as error:
                raise NotOwner(
                    f"group {group} has members; stop its workers, then commit for it"
                ) from error

    async def offsets(
        self, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, tuple[int, int]]:
        """Return (first offset in the log, offset after its last record) of each partition."""
        with translated("read the ends of the logs"):
            await self._require(partitions)
            keys = [KafkaPartition(*tp) for tp in partitions]
            starts = await self._reader.beginning_offsets(keys)
            ends = await self._reader.end_offsets(keys)
        return {TopicPartition(*key): (starts[key], ends[key]) for key in keys}

    async def trim(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Delete the records before these offsets. Raises TransportError beyond a log's end."""
        with translated("trim topics"):
            await self._require(offsets)
            await self._admin.delete_records(
                {KafkaPartition(*tp): RecordsToDelete(offset) for tp, offset in offsets.items()}
            )

    async def _require(self, partitions: Collection[TopicPartition]) -> None:
        """Raise TopicError for a partition that is not there; aiokafka would wait for it."""
        counts = await lifecycle.require_topics(
            self._admin._client, {tp.topic for tp in partitions}, self._settings.request_timeout
        )
        for topic, partition in partitions:
            if not 0 <= partition < counts[topic]:
                raise TopicError(f"{topic} has {counts[topic]} partitions, there is no {partition}")

    async def _configs(self, names: Collection[str], *, every: bool) -> dict[str, dict[str, str]]:
        """Return the configuration of the topics that exist; not `every`: what was set on them."""
        if not names:
            return {}
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        configs: dict[str, dict[str, str]] = {}
        for reply in await self._admin.describe_configs(resources):
            for code, text, _, name, entries in reply.resources:
                error = kafka.for_code(code)
                if error is kafka.UnknownTopicOrPartitionError:
                    continue
                _check([(name, code, text)], None, "describe")
                configs[name] = {
                    key: value
                    for key, value, _, source, *_ in entries
                    if value is not None and (every or source == _SET_ON_TOPIC)
                }
        return configs


def _check(rows: Collection[tuple[Any, ...]], harmless: type[Exception] | None, doing: str) -> None:
    """Raise the first error among (topic, code[, text]); aiokafka's admin leaves that to us."""
    for name, code, *text in rows:
        error = kafka.for_code(code)
        if code and error is not harmless:
            detail = text[0] if text and text[0] else error.__name__
            if error.retriable:
                raise error(f"{doing} {name}: {detail}")
            raise TopicError(f"cannot {doing} topic {name}: {detail}")
