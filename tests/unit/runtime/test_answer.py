"""The answer is written in pieces: a reader loses it whole if they are no JSON together."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streaminfer.runtime.answer import Answers, Form
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor
from tests.unit.runtime.test_sink import PLAN

TEXT = st.text(max_size=20)


def written(
    samples: tuple[Sample, ...], tensors: dict[str, Tensor], *, row: int = 0, **plan: object
) -> dict[str, Any]:
    form = Form(PLAN.model_copy(update=plan), "predictions")
    envelope = Envelope(2, samples, PLAN.digest, "i", tensors, (Hop("s0", 1500, 2500, 1),))
    _, record = Answers(form, envelope).write(row, now=1.0)
    body: dict[str, Any] = json.loads(record.value or b"")
    return body


def ranked(*scores: float) -> dict[str, Tensor]:
    n = len(scores)
    index, score = struct.pack(f"<{n}i", *range(n)), struct.pack(f"<{n}f", *scores)
    return {
        "index": Tensor("I32", (1, n), memoryview(index)),
        "score": Tensor("F32", (1, n), memoryview(score)),
    }


@given(id_=TEXT, meta=st.dictionaries(TEXT, TEXT, max_size=3), label=TEXT, topic=TEXT)
def test_any_text_comes_back_as_it_was(
    id_: str, meta: dict[str, str], label: str, topic: str
) -> None:
    meta.pop("traceparent", None)
    source = PLAN.input.model_copy(update={"topic": topic})
    sample = Sample(7, 7, id_, b"k", 400, meta=meta)
    body = written((sample,), ranked(0.5), labels=(label,), input=source)
    assert (body["id"], body["meta"]) == (id_, meta)
    assert body["source"] == {"topic": topic, "partition": 2, "offset": 7}
    assert body["predictions"] == [{"index": 0, "label": label, "score": 0.5}]
    assert body["timing"]["e2e_ms"] == 600.0


@given(TEXT, TEXT)
def test_any_failure_comes_back_as_it_was(stage: str, message: str) -> None:
    failure = Failure("lost", stage, "timeout", message)
    body = written((Sample(7, 7, "a", None, 0, failure=failure),), {})
    assert body["status"] == "lost"
    assert body["error"] == {"stage": stage, "kind": "timeout", "message": message}
    assert "predictions" not in body


def test_scores_are_rounded_and_classes_without_labels_are_numbers() -> None:
    body = written((Sample(0, 0, "a", b"k", 0),), ranked(0.12345678, 1e-9), labels=())
    assert body["predictions"] == [
        {"index": 0, "label": "0", "score": 0.123457},
        {"index": 1, "label": "1", "score": 0.0},
    ]


def test_a_score_that_is_no_number_does_not_take_the_answer_along() -> None:
    body = written((Sample(0, 0, "a", b"k", 0),), ranked(math.nan, 0.5))
    assert math.isnan(body["predictions"][0]["score"])
    assert body["predictions"][1]["score"] == 0.5


def test_raw_outputs_are_the_row_of_every_tensor() -> None:
    samples = (Sample(0, 0, "a", b"k", 0), Sample(1, 1, "b", b"k", 0))
    tensors = {
        "x": Tensor("F32", (2, 2), memoryview(struct.pack("<4f", 1, 2, 3, 4))),
        "b": Tensor("BF16", (2, 1), memoryview(b"\x80\x3f\x00\x40")),
    }
    body = written(samples, tensors, row=1, top_k=0)
    assert body["outputs"] == {"x": [3.0, 4.0], "b": [2.0]}
