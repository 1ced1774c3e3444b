"""A declaration that cannot work is refused before anything is built, with the key to blame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from streaminfer.errors import ConfigError
from streaminfer.spec import EdgeSpec, InputSpec, KafkaSpec, PipelineSpec, Problem, StageSpec


def declare(**changes: Any) -> PipelineSpec:
    """Return three stages of a small image model, with top-level keys replaced."""
    data: dict[str, Any] = {
        "pipeline": "toy",
        "model": {"factory": "toy.py:build", "example": [3, 8, 8]},
        "stages": [{"name": "a", "until": "l1"}, {"name": "b", "until": "l2"}, {"name": "c"}],
    }
    return PipelineSpec.model_validate(data | changes)


def problems(**changes: Any) -> list[Problem]:
    with pytest.raises(ValidationError) as caught:
        declare(**changes)
    (detail,) = caught.value.errors()
    assert detail["type"] == "refused", detail
    found: list[Problem] = detail["ctx"]["problems"]
    return [Problem((*detail["loc"], *p.path), p.message, p.hint) for p in found]


def test_everything_but_model_and_stages_has_a_default() -> None:
    spec = declare()
    assert (spec.input.topic, spec.output.topic, spec.output.top_k) == ("images", "predictions", 5)
    assert (spec.batch.max, spec.batch.wait) == (16, 0.004)
    assert (spec.kafka.bootstrap, spec.kafka.prefix, spec.kafka.partitions) == (None, "si", 8)
    assert (spec.kafka.max_record_bytes, spec.kafka.history) == (900_000, 600.0)
    assert (spec.kafka.history_bytes, spec.kafka.session_timeout) == (10**9, 30.0)
    assert (spec.metrics.host, spec.metrics.port) == ("127.0.0.1", 9464)
    assert (spec.delivery, spec.memory) == ("at_least_once", 512_000_000)
    assert (spec.input.max_bytes, spec.input.max_pixels) == (16_000_000, 50_000_000)
    assert spec.stage("a") == StageSpec(name="a", until="l1")


def test_a_declaration_cannot_change_under_its_users() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        declare().memory = 1


def test_an_edge_is_its_own_over_the_default() -> None:
    spec = declare(edges={"default": {"dtype": "float16"}, "c": {"compress": "zstd"}})
    assert spec.edge("b") == EdgeSpec(dtype="float16")
    assert spec.edge("c") == EdgeSpec(dtype="float16", compress="zstd")
    assert spec.edge("a") == EdgeSpec()  # it reads the input topic
    back = declare(edges={"default": {"dtype": "float16"}, "c": {"dtype": "native"}})
    assert back.edge("c").dtype == "native"


def test_a_local_edge_carries_tensors_as_they_are() -> None:
    spec = declare(edges={"default": {"dtype": "float16"}, "b": {"transport": "local"}})
    assert spec.edge("b") == EdgeSpec(transport="local")
    with pytest.raises(ValidationError, match="as they are"):
        declare(edges={"b": {"transport": "local", "compress": "lz4"}})


def test_a_local_edge_has_nothing_to_balance() -> None:
    with pytest.raises(ValidationError, match="no partitions to balance"):
        declare(edges={"b": {"transport": "local", "partitioning": "balance"}})
    spec = declare(edges={"default": {"partitioning": "balance"}, "b": {"transport": "local"}})
    assert [spec.edge(n).partitioning for n in "abc"] == ["preserve", "preserve", "balance"]


def test_a_stage_has_its_own_batch_or_the_pipelines() -> None:
    stages = [{"name": "a", "until": "x", "batch": {"max": 4}}, {"name": "b"}]
    spec = declare(stages=stages, batch={"max": 32, "wait": "1ms"})
    assert spec.batch_of("a").max == 4
    assert spec.batch_of("b").max == 32
    assert spec.batch_of("b").wait == 0.001


def test_an_unknown_stage_is_answered_with_the_nearest() -> None:
    spec = declare(stages=[{"name": "stem", "until": "x"}, {"name": "trunk"}])
    for ask in (spec.stage, spec.edge, spec.batch_of):
        with pytest.raises(ConfigError, match="did you mean trunk"):
            ask("trunc")
    with pytest.raises(ConfigError, match="known are: stem, trunk"):
        spec.stage("zzz")


def test_paths_start_at_the_files_folder() -> None:
    spec = declare().at(Path("/models/toy/pipeline.yaml"))
    assert spec.path == Path("/models/toy/pipeline.yaml")
    assert spec.resolve("weights.safetensors") == Path("/models/toy/weights.safetensors")
    assert spec.resolve("/else/w") == Path("/else/w")
    assert declare().resolve("w") == Path("w")
    assert "path" not in spec.model_dump()
    with pytest.raises(ValidationError, match="path"):
        declare(path="x")


@pytest.mark.parametrize(
    ("stages", "path", "words"),
    [
        ([{"name": "a"}, {"name": "b"}], ("stages", 0, "until"), "missing"),
        ([{"name": "a", "until": "x"}], ("stages", 0, "until"), "model's end"),
        ([{"name": "a", "until": "x"}, {"name": "a"}], ("stages", 1, "name"), "two stages"),
        ([{"name": "sink"}], ("stages", 0, "name"), "reserved"),
        ([{"name": "input"}], ("stages", 0, "name"), "reserved"),
        ([{"name": "default"}], ("stages", 0, "name"), "reserved"),
        (
            [{"name": "a", "until": "x"}, {"name": "b", "until": "x"}, {"name": "c"}],
            ("stages", 1, "until"),
            "another stage ends",
        ),
    ],
)
def test_stages_that_cannot_be_cut(stages: list[Any], path: Any, words: str) -> None:
    (problem,) = problems(stages=stages)
    assert problem.path == path
    assert words in problem.message


def test_an_edge_leads_into_a_stage_behind_the_first() -> None:
    (first,) = problems(edges={"a": {}})
    assert first.path == ("edges", "a")
    assert "first stage has no edge" in first.message
    stages = [{"name": "stem", "until": "x"}, {"name": "trunk"}]
    (unknown,) = problems(stages=stages, edges={"trunc": {}})
    assert unknown.path == ("edges", "trunc")
    assert unknown.hint == "did you mean trunk?"


def test_stages_of_one_worker_have_one_number_of_replicas() -> None:
    stages = [{"name": "a", "until": "x", "replicas": 2}, {"name": "b"}]
    (problem,) = problems(stages=stages, edges={"b": {"transport": "local"}})
    assert problem.path == ("stages", 1, "replicas")
    assert declare(stages=stages).stage("a").replicas == 2


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"device": ["cpu", "cuda"]}, "2 in the list for 3 replica(s) of 'a'"),
        ({"shares": [1, 2, 3, 4]}, "4 in the list for 3 replica(s) of 'a'"),
    ],
)
def test_a_list_by_replica_is_as_long_as_there_are_replicas(
    stage: dict[str, Any], words: str
) -> None:
    """A replica without a device would be found out when it starts; one too many never."""
    stages = [{"name": "a", "until": "x", "replicas": 3, **stage}, {"name": "b"}]
    (problem,) = problems(stages=stages)
    assert problem.path == ("stages", 0, *stage)
    assert problem.message == words
    assert f"replicas: {len(next(iter(stage.values())))}" in problem.hint


def test_a_worker_has_one_share() -> None:
    stages = [{"name": "a", "until": "x", "shares": [1]}, {"name": "b", "shares": [1]}]
    (problem,) = problems(stages=stages, edges={"b": {"transport": "local"}})
    assert problem.path == ("stages", 1, "shares")
    declare(stages=stages)


@pytest.mark.parametrize(
    "bad", [{"shares": []}, {"shares": [0]}, {"shares": ["a"]}, {"shares": 2}, {"device": []},
            {"device": ["gpu"]}, {"device": 1}, {"shares": [True]}, {"shares": [float("inf")]}]
)  # fmt: skip
def test_what_is_no_device_and_no_share_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="expected"):
        StageSpec.model_validate({"name": "a", **bad})


def test_all_problems_are_told_at_once() -> None:
    found = problems(
        stages=[{"name": "sink"}, {"name": "b", "until": "x"}],
        edges={"zzz": {}},
        output={"topic": "images"},
    )
    assert [p.path for p in found] == [
        ("stages", 0, "name"),
        ("stages", 0, "until"),
        ("stages", 1, "until"),
        ("edges", "zzz"),
        ("output", "topic"),
    ]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"mean": [0.5]}, ("input", "mean")),
        ({"mean": [0.5] * 3}, ("input", "mean")),
        ({"mean": [0.5] * 3, "std": [1, 1, 0]}, ("input", "std")),
        ({"resize": 8, "crop": 16}, ("input", "crop")),
        ({"decode": "tensor", "crop": 8}, ("input", "decode")),
    ],
)
def test_an_input_that_makes_no_row_is_refused(given: Any, path: tuple[str, ...]) -> None:
    assert path in [p.path for p in problems(input=given)]


@pytest.mark.parametrize(
    ("shape", "given"),
    [([8], {}), ([1, 8, 8], {}), ([3, 8, 8], {"crop": 4}), ([3, 8, 8], {"channels": 1})],
)
def test_the_example_is_what_the_input_gives(shape: list[int], given: dict[str, Any]) -> None:
    (problem,) = problems(model={"factory": "m:f", "example": shape}, input=given)
    assert problem.path == ("model", "example")


def test_tensors_have_any_shape() -> None:
    spec = declare(model={"factory": "m:f", "example": [8]}, input={"decode": "tensor"})
    assert spec.first_model.example == (8,)


def test_an_exported_model_has_all_in_it() -> None:
    for key, value in (("weights", "w.safetensors"), ("kwargs", {"classes": 3})):
        (problem,) = problems(model={"file": "m.pt2", "example": [3, 8, 8], key: value})
        assert problem.path == ("model", key)
        assert "has all in it" in problem.message


def test_inputs_have_names_or_places() -> None:
    one = declare().first_model
    assert {name: each.shape for name, each in one.examples().items()} == {"0": (3, 8, 8)}
    given = {"decode": "tensor"}
    places = declare(
        model={"factory": "m:f", "example": [[3], {"shape": []}]}, input=given
    ).first_model
    assert {name: each.shape for name, each in places.examples().items()} == {"0": (3,), "1": ()}
    ids = {"shape": [4], "dtype": "int64", "max": 9}
    names = declare(model={"factory": "m:f", "example": {"ids": ids, "mask": [4]}}, input=given)
    found = names.first_model.examples()
    assert (found["ids"].max, found["ids"].dtype, found["mask"].dtype) == (9, "int64", "float32")


def test_the_inputs_part_of_the_digest_is_what_changes_numbers() -> None:
    one = InputSpec(crop=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    same = InputSpec(crop=8, mean=(0.5,) * 3, std=(0.2,) * 3, topic="x", max_bytes=1, max_pixels=1)
    assert one.numbers() == same.numbers()
    for change in ({"crop": 7}, {"resize": 9}, {"mean": (0.4,) * 3}, {"std": (0.1,) * 3}):
        assert one.model_copy(update=change).numbers() != one.numbers()
    assert set(one.numbers()) == {"decode", "channels", "resize", "crop", "mean", "std"}
    assert json.loads(json.dumps(one.numbers())) == one.numbers()


def test_the_input_survives_the_plan_file() -> None:
    given = InputSpec(crop=8, resize=9, mean=(0.485, 0.456, 0.406), std=(0.2,) * 3, max_bytes=7)
    assert InputSpec.model_validate_json(given.model_dump_json()) == given


@pytest.mark.parametrize("key", ["sasl_username", "sasl_password"])
def test_credentials_and_protocol_belong_together(key: str) -> None:
    login = {"sasl_username": "u", "sasl_password": "p"}
    assert declare(kafka={"security_protocol": "SASL_SSL", **login}).kafka.sasl_password
    missing = {k: v for k, v in login.items() if k != key}
    assert [p.path for p in problems(kafka={"security_protocol": "SASL_SSL", **missing})] == [
        ("kafka", key)
    ]
    # a login that is not used would go unnoticed until the broker asks for it
    assert [p.path for p in problems(kafka={key: "x"})] == [("kafka", key)]
    assert [p.path for p in problems(kafka={"ssl_keyfile": "k"})] == [("kafka", "ssl_certfile")]


def test_a_password_is_never_printed() -> None:
    spec = declare(
        kafka={
            "security_protocol": "SASL_SSL",
            "sasl_username": "u",
            "sasl_password": "hunter2",
        }
    )
    for text in (repr(spec), str(spec), spec.model_dump_json(), str(spec.kafka)):
        assert "hunter2" not in text
    assert spec.kafka.sasl_password
    assert spec.kafka.sasl_password.get_secret_value() == "hunter2"


def test_exactly_once_is_answered_with_what_is_there() -> None:
    with pytest.raises(ValidationError, match=r"transactional sink.*use at_least_once"):
        declare(delivery="exactly_once")


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (None, None),
        ("imagenet", "imagenet"),
        ("names.txt", "names.txt"),
        (["cat", "dog"], ("cat", "dog")),
        ([0, 1, 2], ("0", "1", "2")),
    ],
)
def test_labels_are_a_file_or_the_words(labels: Any, kept: Any) -> None:
    assert declare(output={"labels": labels}).output.labels == kept


@pytest.mark.parametrize("labels", [3, [], [True, "x"], {"a": 1}, [["a"]]])
def test_labels_that_are_none_are_refused(labels: Any) -> None:
    with pytest.raises(ValidationError, match="expected the path of a text file"):
        declare(output={"labels": labels})


def test_a_version_keeps_its_digits() -> None:
    model = {"factory": "m:f", "example": [3, 8, 8]}
    assert declare(model={**model, "version": 2}).first_model.version == "2"
    with pytest.raises(ValidationError, match="valid string"):
        declare(model={**model, "version": 1.1})  # was written as 1.10


@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"max": 0}},
        {"batch": {"max": 1025}},
        {"batch": {"max": True}},
        {"memory": 0},
        {"memory": "lots"},
        {"stages": []},
        {"pipeline": "a/b"},
        {"metrics": {"port": 65536}},
        {"kafka": {"partitions": 0}},
        {"kafka": {"max_record_bytes": "1kB"}},
        {"kafka": {"session_timeout": 0}},
        {"input": {"channels": 4}},
        {"input": {"mean": [float("nan")] * 3, "std": [1, 1, 1]}},
        {"output": {"top_k": -1}},
        {"stages": [{"name": "a", "replicas": 0}]},
        {"stages": [{"name": "a", "threads": 0}]},
        {"stages": [{"name": "a", "devise": "cpu"}]},
        {"model": {"factory": "m:f", "example": []}},
        {"model": {"factory": "m:f", "example": [3, 0, 8]}},
        {"model": {"factory": "m:f", "example": [3, 8, 8], "kwargs": {"x": object()}}},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        declare(**change)


def test_kafka_defaults_need_no_login() -> None:
    assert KafkaSpec().security_protocol == "PLAINTEXT"
    assert KafkaSpec().ssl_check_hostname is True
