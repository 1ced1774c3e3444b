"""Every Prometheus metric: its name, labels and buckets, in one place.

Units are seconds, bytes and ratios 0-1. No id, key or text is ever a label. Every combination of a
closed label set exists at 0 from the start, so that `increase()` sees the first event.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, make_asgi_app
from prometheus_client import Histogram as _Histogram
from prometheus_client import disable_created_metrics as _disable_created
from prometheus_client.parser import text_string_to_metric_families

from streaminfer.errors import KINDS

__all__ = ["ACTIVITIES", "OUTCOMES", "Metrics", "Reading", "StageMetrics", "parse"]

_disable_created()  # type: ignore[no-untyped-call]

ACTIVITIES = ("decode", "compute", "encode", "produce")
OUTCOMES = ("ok", "error", "expired")
LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COMPUTE = tuple(0.0005 * 2**k for k in range(13))
BATCH = tuple(2**k for k in range(10))
BYTES = tuple(1024 * 4**k for k in range(8))


class Histogram(_Histogram):
    """A histogram that takes many values at once: a lock a bucket, not two a value."""

    def observe_all(self, amounts: Collection[float]) -> None:
        """Observe each of the amounts."""
        if not amounts:
            return
        self._sum.inc(sum(amounts))
        found = Tally(bisect_left(self._upper_bounds, amount) for amount in amounts)
        for bucket, count in found.items():
            self._buckets[bucket].inc(count)


class Metrics:
    """The metrics of one process: its own registry, never the global one."""

    def __init__(self, pipeline: str, **facts: str) -> None:
        self.pipeline = pipeline
        self.registry = CollectorRegistry()
        self._stages: dict[str, StageMetrics] = {}
        stage = ("pipeline", "stage")
        self._count_things(stage)
        self._time_things(stage)
        self._gauge_things(stage)
        self._watch_joins(stage)
        self._watch_sink()
        info = Info("streaminfer_build", "What runs here", registry=self.registry)
        info.info({"pipeline": pipeline, **facts})

    def _count_things(self, stage: tuple[str, str]) -> None:
        self.consumed = self._counter("stage_records_consumed", "Records received", stage)
        self.produced = self._counter("stage_records_produced", "Records acked", stage)
        self.samples = self._counter(
            "stage_samples", "Samples finished by this stage", (*stage, "outcome")
        )
        self.batches = self._counter("stage_batches", "Batches run on the device", stage)
        self.received_bytes = self._counter("stage_received_bytes", "Bytes received", stage)
        self.sent_bytes = self._counter("stage_sent_bytes", "Bytes sent", stage)
        self.errors = self._counter("stage_errors", "Samples that failed here", (*stage, "kind"))
        self.retries = self._counter(
            "stage_retries", "Tries after the first", (*stage, "operation")
        )
        self.rebalances = self._counter("consumer_rebalances", "Assignments received", stage)
        self.lost = self._counter(
            "consumer_lost_records", "Offsets that the log no longer had", stage
        )
        self.busy = self._counter(
            "stage_busy_seconds", "Time spent, by activity", (*stage, "activity")
        )

    def _time_things(self, stage: tuple[str, str]) -> None:
        self.batch_size = self._histogram(
            "stage_batch_size_samples", "Samples in a device batch", stage, BATCH
        )
        self.queue_time = self._histogram(
            "stage_queue_duration_seconds", "Record's time to its batch's start", stage, LATENCY
        )
        self.batch_wait = self._histogram(
            "stage_batch_wait_seconds", "Time a batch waited to fill", stage, COMPUTE
        )
        self.compute_time = self._histogram(
            "stage_compute_duration_seconds", "One device batch", stage, COMPUTE
        )
        self.codec_time = self._histogram(
            "stage_codec_duration_seconds",
            "Wire to tensors and back, one batch",
            (*stage, "direction"),
            COMPUTE,
        )
        self.record_size = self._histogram(
            "record_size_bytes", "Size of one record", (*stage, "direction"), BYTES
        )

    def _gauge_things(self, stage: tuple[str, str]) -> None:
        self.inflight = self._gauge(
            "stage_inflight_samples", "Samples received and not yet settled", stage
        )
        self.queue = self._gauge("stage_queue_samples", "Samples waiting for the device", stage)
        self.lag = self._gauge(
            "consumer_lag_records", "Records behind the log's end", (*stage, "topic", "partition")
        )
        self.lag_seconds = self._gauge(
            "consumer_lag_seconds",
            "Age of the oldest unsettled record",
            (*stage, "topic", "partition"),
        )
        self.paused = self._gauge("stage_paused", "1 while the window holds the input", stage)
        self.ready = self._gauge("stage_ready", "1 while this worker can take work", stage)
        self.share_weight = self._gauge(
            "stage_share_weight",
            "Weight by which this replica gets its share of the partitions",
            (*stage, "replica"),
        )
        self.last_success = self._gauge(
            "stage_last_success_timestamp_seconds", "When a commit last went through", stage
        )
        self.torch_allocated = self._gauge(
            "torch_memory_allocated_bytes", "Memory torch's tensors use on the device", stage
        )
        self.torch_reserved = self._gauge(
            "torch_memory_reserved_bytes", "Memory torch holds on the device", stage
        )
        self.resident = self._gauge(
            "process_resident_bytes", "Resident memory of the worker", stage
        )

    def _watch_joins(self, stage: tuple[str, str]) -> None:
        self.exits = self._counter("stage_exits", "Samples that the stage's exit answered", stage)
        self.gather_held = self._gauge(
            "gather_held_samples", "Samples of which some parts came and others did not yet", stage
        )
        self.gather_wait = self._histogram(
            "gather_wait_seconds", "Time from a sample's first part to its turn", stage, LATENCY
        )
        self.partial = self._counter(
            "gather_partial_samples", "Samples that went on without some of their branches", stage
        )
        self.missing = self._counter(
            "gather_missing_samples",
            "Samples that this part did not come for in time",
            (*stage, "part"),
        )

    def _watch_sink(self) -> None:
        self.window = self._gauge(
            "ingest_window_samples", "Most samples in flight per input partition", ("pipeline",)
        )
        self.held = self._gauge(
            "sink_held_samples", "Samples that wait for their turn in order", ("pipeline",)
        )
        self.duplicates = self._counter(
            "sink_duplicates", "Samples that came again and were dropped", ("pipeline",)
        )
        self.clock_skew = self._counter(
            "sink_clock_skew", "Input records from the future", ("pipeline",)
        )
        self.e2e = self._histogram(
            "e2e_latency_seconds", "Input record's time to its acked answer", ("pipeline",), LATENCY
        )
        self.order_wait = self._histogram(
            "sink_aggregation_wait_seconds",
            "Time a sample waited for its turn",
            ("pipeline",),
            LATENCY,
        )

    def stage(self, name: str) -> StageMetrics:
        """Return the metrics of one stage, all at 0 the first time."""
        if name not in self._stages:
            self._stages[name] = StageMetrics(self, name)
        return self._stages[name]

    def start_sink(self) -> None:
        """Create the sink's own series at 0."""
        for metric in (self.held, self.duplicates, self.clock_skew, self.e2e, self.order_wait):
            metric.labels(self.pipeline)

    def asgi(self) -> Scrape:
        """Return the ASGI app of /metrics."""
        return Scrape(self.registry)

    def readings(self, *names: str) -> list[Reading]:
        """Return what /metrics would say now; of samples of these names only, if there are any.

        All of them take 10 ms, for which an event loop does nothing else.
        """
        wanted = self.registry.restricted_registry(names) if names else self.registry
        return [
            Reading(s.name, s.labels, s.value)
            for family in wanted.collect()
            for s in family.samples
        ]

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(f"streaminfer_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str]) -> Gauge:
        return Gauge(f"streaminfer_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str], buckets: Iterable[float]
    ) -> Histogram:
        return Histogram(
            f"streaminfer_{name}", text, labels, buckets=tuple(buckets), registry=self.registry
        )


class StageMetrics:
    """The metrics of one stage (or of the sink), labels bound once."""

    def __init__(self, metrics: Metrics, stage: str) -> None:
        labels = (metrics.pipeline, stage)
        self.name, self.all = stage, metrics
        self.consumed = metrics.consumed.labels(*labels)
        self.produced = metrics.produced.labels(*labels)
        self.batches = metrics.batches.labels(*labels)
        self.received_bytes = metrics.received_bytes.labels(*labels)
        self.sent_bytes = metrics.sent_bytes.labels(*labels)
        self.rebalances = metrics.rebalances.labels(*labels)
        self.lost = metrics.lost.labels(*labels)
        self.batch_size = metrics.batch_size.labels(*labels)
        self.queue_time = metrics.queue_time.labels(*labels)
        self.batch_wait = metrics.batch_wait.labels(*labels)
        self.compute_time = metrics.compute_time.labels(*labels)
        self.inflight = metrics.inflight.labels(*labels)
        self.queue = metrics.queue.labels(*labels)
        self.torch_allocated = metrics.torch_allocated.labels(*labels)
        self.torch_reserved = metrics.torch_reserved.labels(*labels)
        self.samples = {o: metrics.samples.labels(*labels, o) for o in OUTCOMES}
        self.errors = {k: metrics.errors.labels(*labels, k) for k in KINDS}
        self.retries = {o: metrics.retries.labels(*labels, o) for o in ("compute", "produce")}
        self.busy = {a: metrics.busy.labels(*labels, a) for a in ACTIVITIES}
        self.codec_time = {d: metrics.codec_time.labels(*labels, d) for d in ("decode", "encode")}
        self.record_size = {d: metrics.record_size.labels(*labels, d) for d in ("in", "out")}
        self.exits = metrics.exits.labels(*labels)
        self._labels = labels

    def start_worker(self) -> None:
        """Create the series of a worker at 0: a stage that runs within another's has none."""
        self.paused = self.all.paused.labels(*self._labels)
        self.ready = self.all.ready.labels(*self._labels)
        self.last_success = self.all.last_success.labels(*self._labels)
        self.resident = self.all.resident.labels(*self._labels)

    def start_gather(self, parts: Iterable[str]) -> None:
        """Create the series of a gather at 0."""
        self.gather_held = self.all.gather_held.labels(*self._labels)
        self.gather_wait = self.all.gather_wait.labels(*self._labels)
        self.partial = self.all.partial.labels(*self._labels)
        self.missing = {p: self.all.missing.labels(*self._labels, p) for p in parts}

    def lag(self, topic: str, partition: int, records: int, seconds: float) -> None:
        """Say how far behind this worker is with one partition."""
        where = (*self._labels, topic, str(partition))
        self.all.lag.labels(*where).set(records)
        self.all.lag_seconds.labels(*where).set(seconds)

    def share(self, replica: int, weight: float) -> None:
        """Say with what weight a replica joined its group."""
        self.all.share_weight.labels(*self._labels, str(replica)).set(weight)

    def no_lag(self, topic: str, partition: int) -> None:
        """Forget a partition that another member has now."""
        where = (*self._labels, topic, str(partition))
        for gauge in (self.all.lag, self.all.lag_seconds):
            try:
                gauge.remove(*where)
            except KeyError:
                continue


class Scrape:
    """The ASGI app of /metrics; a class, so that a router takes it for an app."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._app = make_asgi_app(registry=registry)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        await self._app(scope, receive, send)


class Reading(NamedTuple):
    """One series' value, as Prometheus would scrape it."""

    name: str
    labels: dict[str, str]
    value: float


def parse(text: str) -> Iterator[Reading]:
    """Read the text format: what another process' /metrics says."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield Reading(sample.name, sample.labels, sample.value)
