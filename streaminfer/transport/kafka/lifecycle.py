"""Connect, look up topics and stop, each within a time that aiokafka alone does not keep."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from aiokafka import errors as kafka
from aiokafka.protocol.metadata import MetadataRequest

from streaminfer.errors import TopicError, TransportError

__all__ = ["connect", "partition_counts", "require_gone", "require_topics", "stop"]

_logger = logging.getLogger(__name__)

_GRACE = 2.0  # seconds until every broker knows a topic that was made just now
_PAUSE = 0.1  # between two tries


async def connect(start: Callable[[], Awaitable[None]], bootstrap: str, limit: float) -> None:
    """Run a client's `start`. Raises TransportError naming the address, within `limit` seconds."""
    try:
        async with asyncio.timeout(limit):
            await start()
    except (kafka.KafkaError, OSError, TimeoutError) as error:
        raise TransportError(
            f"no Kafka at {bootstrap}: {str(error) or f'no answer within {limit:g} s'}; is it"
            " running, and are address, security protocol and password right?"
        ) from error


async def partition_counts(client: Any, names: Collection[str]) -> dict[str, int]:
    """Return the partition count of the topics that exist among `names`; creates none.

    Raises:
        aiokafka.errors.KafkaError: no answer, or no permission.
    """
    if not names:
        return {}
    node = client.get_random_node()
    reply = await client.send(node, MetadataRequest(list(names), allow_auto_topic_creation=False))
    counts: dict[str, int] = {}
    for code, name, _, partitions in reply.topics:
        error = kafka.for_code(code)
        if issubclass(error, kafka.TopicAuthorizationFailedError | kafka.InvalidTopicError):
            raise error(name)
        if partitions:
            counts[name] = len(partitions)
    return counts


async def require_topics(client: Any, names: Collection[str], limit: float) -> dict[str, int]:
    """Return the partition count of every topic in `names`.

    Raises:
        TopicError: one is missing, known after 2 s (aiokafka by itself would wait for 40).
        aiokafka.errors.KafkaError: no broker answered within `limit` seconds.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while True:
        try:
            counts = await partition_counts(client, names)
        except kafka.KafkaError as error:
            if not error.retriable or loop.time() - begin > limit:
                raise
        else:
            missing = sorted(set(names) - set(counts))
            if not missing:
                return counts
            if loop.time() - begin > _GRACE:
                raise TopicError(
                    f"no topic {', '.join(missing)}; make it: streaminfer topics apply PIPELINE"
                )
        await asyncio.sleep(_PAUSE)


async def require_gone(client: Any, names: Collection[str], limit: float) -> None:
    """Return once none of the topics is there. Raises TimeoutError after `limit` seconds."""
    async with asyncio.timeout(limit):
        while await partition_counts(client, names):  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(_PAUSE)


async def stop(stopping: Awaitable[None], client: Any, limit: float) -> None:
    """Await a client's `stop()`, and bring it to an end if it hangs: 2 * `limit` at most."""
    task = asyncio.ensure_future(stopping)
    await asyncio.wait({task}, timeout=limit)
    if not task.done():
        # What it waits for is an answer; without connections that comes, as an error.
        closing = asyncio.ensure_future(client.close())
        await asyncio.wait({task, closing}, timeout=limit)
        closing.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=1)
    if task.done() and not task.cancelled() and (error := task.exception()):
        _logger.warning("a Kafka client did not stop cleanly: %r", error)
        await client.close()
