"""Send images, await predictions: what a user's program holds of a pipeline.

A prediction is recognised by the input partition and offset that the client's own send was acked
with, so ids may repeat and other clients may share the topics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np

from streaminfer.errors import ConfigError, TransportError
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load
from streaminfer.transport import Consumer, Headers, Outgoing, Position, Producer, Record, Transport
from streaminfer.transport.kafka import KafkaSettings, KafkaTransport
from streaminfer.wire import TENSOR_INPUT, Tensor, TensorInput, encode_tensor_input, pack

__all__ = ["Client", "Error", "Label", "Prediction", "Source", "connect"]

Value: TypeAlias = Any  # bytes, a tensor of numpy or torch, or a dict of such tensors

EARLY = 10_000  # answers kept that came before the ack of what they answer


@dataclass(frozen=True, slots=True)
class Label:
    """One class of the top k; `score` is 0-1."""

    index: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Error:
    """Why there is no prediction."""

    stage: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Source:
    """The input record that is answered."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """One input's one outcome. `status` is "ok", "error", "expired" or "lost"."""

    id: str
    status: str
    source: Source
    predictions: tuple[Label, ...] = ()
    outputs: Mapping[str, Any] = field(default_factory=dict)  # where top_k is 0
    error: Error | None = None
    partial: bool = False  # an ensemble's answer without some of its branches
    e2e_ms: float = 0.0
    meta: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)  # the message as it is

    @property
    def top1(self) -> Label:
        """The best class. Raises LookupError where there is none."""
        if not self.predictions:
            raise LookupError(f"{self.id}: status {self.status}, no classes ({self.error})")
        return self.predictions[0]

    @classmethod
    def parse(cls, value: bytes) -> Prediction:
        """Read a message of the predictions topic. Raises ValueError."""
        raw = json.loads(value)
        try:
            return cls(
                id=raw["id"],
                status=raw["status"],
                source=Source(**raw["source"]),
                predictions=tuple(Label(**p) for p in raw.get("predictions", ())),
                outputs=raw.get("outputs", {}),
                error=Error(**raw["error"]) if "error" in raw else None,
                partial=raw["partial"],
                e2e_ms=raw["timing"]["e2e_ms"],
                meta=raw.get("meta", {}),
                raw=raw,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a streaminfer prediction: {error}") from None


def connect(spec: PipelineSpec, **options: Any) -> KafkaTransport:
    """Make the Kafka transport that a pipeline file and the environment describe."""
    kafka = spec.kafka
    if not kafka.bootstrap:
        raise ConfigError(
            "no Kafka address",
            where="kafka.bootstrap",
            hint="--kafka HOST:PORT, or KAFKA_BOOTSTRAP_SERVERS, or kafka.bootstrap in the file",
        )
    return KafkaTransport(
        KafkaSettings(
            bootstrap=kafka.bootstrap,
            security_protocol=kafka.security_protocol,
            sasl_mechanism=kafka.sasl_mechanism,
            sasl_username=kafka.sasl_username,
            sasl_password=kafka.sasl_password.get_secret_value() if kafka.sasl_password else None,
            ssl_cafile=kafka.ssl_cafile,
            ssl_certfile=kafka.ssl_certfile,
            ssl_keyfile=kafka.ssl_keyfile,
            ssl_check_hostname=kafka.ssl_check_hostname,
            session_timeout=kafka.session_timeout,
            **options,
        )
    )


class Client:
    """An async client of one pipeline.

        async with Client("localhost:9092", pipeline="pipeline.yaml") as client:
            answer = await client.predict(Path("cat.jpg").read_bytes(), id="cat-1")
            answer = await client.predict({"input_ids": ids, "attention_mask": mask})
            async for answer in client.stream(Path("images").iterdir()): ...

    `transport` replaces the address (the memory bus of a pipeline in this process).
    """

    def __init__(
        self,
        bootstrap: str | None = None,
        *,
        pipeline: str | Path | PipelineSpec,
        transport: Transport | None = None,
    ) -> None:
        flags = {"kafka.bootstrap": bootstrap} if bootstrap else {}
        spec = pipeline if isinstance(pipeline, PipelineSpec) else load(Path(pipeline), flags)
        self.transport = transport or connect(spec, max_record_bytes=spec.input.max_bytes + 65_536)
        self._input, self._output = spec.input.topic, spec.output.topic
        self._stack = contextlib.AsyncExitStack()
        self._producer: Producer | None = None
        self._reader: asyncio.Task[None] | None = None
        self._sender = asyncio.Lock()
        self._waiting: dict[tuple[int, int], asyncio.Future[Prediction]] = {}
        self._early: OrderedDict[tuple[int, int], Prediction] = OrderedDict()

    async def __aenter__(self) -> Self:
        """Connect. Raises TransportError without a broker, TopicError without the topics."""
        self._producer = await self._stack.enter_async_context(self.transport.producer())
        consumer = self.transport.consumer([self._output], None, from_end=True)
        await self._stack.enter_async_context(consumer)
        self._reader = asyncio.create_task(self._read(consumer), name="client")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect; what is still awaited is cancelled."""
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        for future in self._waiting.values():
            future.cancel()
        await self._stack.aclose()

    async def send(
        self,
        value: Value | None,
        *,
        id: str | None = None,
        headers: Headers = (),
        meta: Mapping[str, str] | None = None,
        deadline_ms: int | None = None,
    ) -> asyncio.Future[Position]:
        """Hand over one input (waits while the buffer is full); the future is its ack.

        `value` is an image file's bytes, or one sample as a tensor (of numpy or torch, without a
        batch dimension), or a dict of them by input. `id` is the record's key, so what has one id
        stays in order. `deadline_ms` is how many milliseconds after now an answer is still worth
        its compute.

        Raises WireError for a tensor that cannot travel.
        """
        if self._producer is None:
            raise TransportError("the client is closed: use it as `async with Client(…)`")
        body, kind = _message(value)
        more = [*headers, *kind]
        more += [(f"si-meta-{name}", text.encode()) for name, text in (meta or {}).items()]
        if deadline_ms is not None:
            more.append(("si-deadline-ms", str(deadline_ms).encode()))
        key = id.encode() if id is not None else None
        async with self._sender:
            return await self._producer.send(Outgoing(self._input, body, key, None, tuple(more)))

    async def predict(
        self,
        value: Value,
        *,
        id: str | None = None,
        headers: Headers = (),
        meta: Mapping[str, str] | None = None,
        deadline_ms: int | None = None,
        timeout: float = 60.0,  # noqa: ASYNC109 - a bound on the answer, told as such
    ) -> Prediction:
        """Send one input, as `send`, and await its outcome; errors are outcomes too (`status`).

        Raises TimeoutError when there is none after `timeout` seconds (it may still come).
        """
        ack = await self.send(value, id=id, headers=headers, meta=meta, deadline_ms=deadline_ms)
        async with asyncio.timeout(timeout):
            return await self._answer(await ack)

    async def stream(
        self,
        images: Iterable[Any] | AsyncIterable[Any],
        *,
        concurrency: int = 256,
        timeout: float = 60.0,  # noqa: ASYNC109 - per answer
    ) -> AsyncGenerator[Prediction, None]:
        """Send many and yield their outcomes in the order of sending.

        An image is bytes, a path, a tensor or a dict of them (see `send`), or a pair (id, any of
        these); a path's id is its name. At most `concurrency` are unanswered at once.
        """
        pending: deque[asyncio.Future[Position]] = deque()
        async for name, value in _each(images):
            pending.append(await self.send(value, id=name))
            while len(pending) >= concurrency:
                yield await self._timed(pending.popleft(), timeout)
        while pending:
            yield await self._timed(pending.popleft(), timeout)

    async def watch(self, *, from_beginning: bool = False) -> AsyncGenerator[Prediction, None]:
        """Yield every prediction of the pipeline as it comes, whoever asked for it."""
        consumer = self.transport.consumer([self._output], None, from_end=not from_beginning)
        async with consumer:
            while True:
                for record in await consumer.poll(0.5):
                    if answer := _parsed(record):
                        yield answer

    async def _timed(self, ack: asyncio.Future[Position], seconds: float) -> Prediction:
        async with asyncio.timeout(seconds):
            return await self._answer(await ack)

    async def _answer(self, position: Position) -> Prediction:
        where = (position.partition, position.offset)
        if where in self._early:
            return self._early.pop(where)
        if self._reader is not None and self._reader.done():
            self._reader.result()
        future: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self._waiting[where] = future
        try:
            return await future
        finally:
            self._waiting.pop(where, None)

    async def _read(self, consumer: Consumer) -> None:
        try:
            while True:
                for record in await consumer.poll(0.5):
                    if (answer := _parsed(record)) and answer.source.topic == self._input:
                        self._deliver(answer)
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            raise

    def _deliver(self, answer: Prediction) -> None:
        where = (answer.source.partition, answer.source.offset)
        future = self._waiting.get(where)
        if future is not None and not future.done():
            future.set_result(answer)
        else:
            self._early[where] = answer
            if len(self._early) > EARLY:
                self._early.popitem(last=False)


def _parsed(record: Record) -> Prediction | None:
    """Read a record of the predictions topic; what isn't ours there is passed over."""
    try:
        return Prediction.parse(record.value or b"")
    except ValueError:
        return None


async def _each(
    images: Iterable[Any] | AsyncIterable[Any],
) -> AsyncIterator[tuple[str | None, Value]]:
    if isinstance(images, AsyncIterable):
        async for image in images:
            yield await _loaded(image)
    else:
        for image in images:
            yield await _loaded(image)


async def _loaded(image: Any) -> tuple[str | None, Value]:
    name, value = image if isinstance(image, tuple) else (None, image)
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        return name or path.name, await asyncio.to_thread(path.read_bytes)
    return name, value


def _message(value: Value | None) -> tuple[bytes | None, list[tuple[str, bytes]]]:
    """Return a record's value, and the header that says what is in it if it is tensors."""
    if value is None or isinstance(value, (bytes, bytearray, memoryview)):
        return None if value is None else bytes(value), []
    if isinstance(value, Mapping):
        message = TensorInput(tensors={str(name): _packed(one) for name, one in value.items()})
    else:
        message = TensorInput(_packed(value))
    return encode_tensor_input(message), [("content-type", TENSOR_INPUT.encode())]


def _packed(value: Any) -> Tensor:
    """Return a numpy array, a torch tensor or nested lists as they travel: little endian."""
    if hasattr(value, "detach"):  # torch's, without importing it
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            halves = value.contiguous().view(value.new_empty(0).short().dtype).numpy()
            return pack("BF16", halves.shape, halves.astype("<i2", order="C").data)
        value = value.numpy()
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return pack(array.dtype.name, array.shape, memoryview(array.tobytes()))
