"""One run tells a user all that is wrong with a file, and where each value came from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from streaminfer.errors import ConfigError
from streaminfer.spec import PipelineSpec, load, origins

ROOT = Path(__file__).parents[3]
BASE = """\
pipeline: toy
model: {factory: "toy.py:build", example: [3, 8, 8]}
stages:
  - {name: stem, until: layer1}
  - {name: trunk-1, until: layer2}
  - {name: head}
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "toy.yaml"
        path.write_text(text)
        return path

    return to_file


def refused(
    path: Path, flags: Mapping[str, str] = {}, environ: Mapping[str, str] = {}
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, flags, environ)
    return caught.value


def loaded(
    path: Path, flags: Mapping[str, str] = {}, environ: Mapping[str, str] = {}
) -> PipelineSpec:
    return load(path, flags, environ)  # never this process' environment


# ---- what a file says ------------------------------------------------------------------------


def test_a_file_is_read_and_knows_where_it_is(write: Write) -> None:
    path = write(BASE + "memory: 1GB\nbatch: {max: 4, wait: 2ms}\nkafka:\n")
    spec = loaded(path)
    assert (spec.memory, spec.batch.max, spec.batch.wait) == (10**9, 4, 0.002)
    assert spec.kafka.partitions == 8  # a section with nothing below it
    assert spec.resolve("weights.safetensors") == path.parent / "weights.safetensors"


def test_an_unknown_key_is_answered_with_line_and_nearest(write: Write) -> None:
    error = refused(write(BASE + "kafka:\n  prefix: si\n  partitons: 4\n"))
    assert error.where.endswith("toy.yaml:9: kafka.partitons")
    assert error.message == "unknown key"
    assert error.hint == "did you mean partitions?"


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("batc: {}\n", 7, "batc", "did you mean batch?"),
        ("edges: {heat: {}}\n", 7, "edges.heat", "did you mean head?"),
        ("edges:\n  head: {dtyp: native}\n", 8, "edges.head.dtyp", "did you mean dtype?"),
        ("edges: {head: {dtype: float61}}\n", 7, "edges.head.dtype", "did you mean float16?"),
        ("edges: {head: fast}\n", 7, "edges.head", "expected a mapping"),
        ("kafka: 5\n", 7, "kafka", "expected a mapping (key: value), found 5"),
        ("batch:\n  max: many\n", 8, "batch.max", 'expected a whole number, found "many"'),
        ("batch: {max: 0}\n", 7, "batch.max", "expected at least 1, found 0"),
        ("batch: {max: 2000}\n", 7, "batch.max", "expected at most 1024, found 2000"),
        ("batch: {max: yes}\n", 7, "batch.max", "put a word in quotes"),
        ("memory: lots\n", 7, "memory", 'expected a size as 900000, "900kB"'),
        ("metrics: {host: [a, b]}\n", 7, "metrics.host", "expected a text, found a list of 2"),
        ("input: {mean: 0.5}\n", 7, "input.mean", "expected a list, found 0.5"),
        ("input: {crop: null, resize: x}\n", 7, "input.resize", "expected a whole number"),
        ("input: {crop: 4}\n", 2, "model.example", "hint: [3, 4, 4]"),
        ("kafka: {ssl_check_hostname: maybe}\n", 7, "kafka.ssl_check_hostname", "true or false"),
        ("delivery: exactly_once\n", 7, "delivery", "use at_least_once"),
        ("output: {labels: [no, x]}\n", 7, "output.labels", "expected the path of a text file"),
        ("pipeline: other\n", 1, "pipeline", "again in line 7"),
        ("batch: {max: 4, max: 8}\n", 7, "batch.max", "again in line 7"),
        ("batch: {max: !fish 3}\n", 7, "batch.max", "this is no !fish"),
        ("? [a, b]\n: 3\n", 7, "?", "unknown key"),
    ],
)
def test_every_mistake_is_placed_and_explained(
    write: Write, text: str, line: int, key: str, words: str
) -> None:
    error = refused(write(BASE + text))
    assert f"toy.yaml:{line}: {key}: " in str(error)
    assert words in str(error)


@pytest.mark.parametrize(
    ("example", "key", "words"),
    [
        ("{a: {shap: [3]}}", "model.example.a.shap", "unknown key (did you mean shape?)"),
        ("{a: {shape: [3], dtype: int46}}", "model.example.a.dtype", "did you mean int64?"),
        ("{a: {shape: [3], dtype: int64}}", "model.example.a.max", "is missing (int64 values"),
        ("{a: {shape: [3], max: 5}}", "model.example.a.max", "is for whole numbers"),
        ("{a: {shape: [3], dtype: int8, max: 500}}", "model.example.a.max", "at most 128"),
        ("{a: [3, 0]}", "model.example.a.shape.1", "expected at least 1, found 0"),
        ("[[3], [x]]", "model.example.1.shape.0", "expected a whole number, or a range as"),
        ("[[3, 8, 8], [2]]", "model.example", "2 inputs, but an image is one"),
        ("{a: {shape: [3, 8, 8], dtype: float16}}", "model.example", "an image is float32"),
        ("{}", "model.example", "expected at least 1"),
        ("5", "model.example", "expected a list, found 5"),
    ],
)
def test_mistakes_in_an_example_of_several_inputs_are_placed(
    write: Write, example: str, key: str, words: str
) -> None:
    error = refused(write(BASE.replace("[3, 8, 8]", example)))
    assert f"toy.yaml:2: {key}: " in str(error).replace("\n  hint", " hint")
    assert words in str(error).replace("\n  hint: ", " (")


def test_a_model_has_one_source(write: Write) -> None:
    both = refused(write(BASE.replace("factory: ", "file: m.pt2, factory: ")))
    assert "toy.yaml:2: model.factory: factory and file exclude each other" in str(both)
    neither = refused(write(BASE.replace('factory: "toy.py:build", ', "")))
    assert "toy.yaml:2: model.factory: is missing" in str(neither)


def test_no_pipeline_file_can_trust_itself(write: Write) -> None:
    assert not load(write(BASE)).trust
    assert load(write(BASE)).trusted().trust
    assert refused(write(BASE + "trust: true\n")).message == "unknown key"


def test_stages_are_called_by_their_names(write: Write) -> None:
    error = refused(write(BASE.replace("name: head", "name: head, devise: cpu")))
    assert error.where.endswith("toy.yaml:6: stages.head.devise")
    assert error.hint == "did you mean device?"


def test_all_problems_come_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = BASE.replace("[3, 8, 8]", "[3, 8, x]").replace("name: head", "device: gpu")
    error = refused(write(text + "memory: lots\nmemory: 1\nbatch: {mx: 3}\n"))
    first, *lines = str(error).splitlines()
    assert first.endswith("5 problems")
    assert [line.split("toy.yaml:")[1].split(": ")[:2] for line in lines] == [
        ["2", "model.example.2"],
        ["6", "stages.2.name"],
        ["6", "stages.2.device"],
        ["7", "memory"],
        ["9", "batch.mx"],
    ]


def test_a_missing_key_is_placed_where_it_should_stand(write: Write) -> None:
    error = refused(write(BASE.replace("factory: ", "factori: ")))
    assert "toy.yaml:2: model.factory: is missing" in str(error)
    assert "toy.yaml:2: model.factori: unknown key (did you mean factory?)" in str(error)
    assert "toy.yaml:1: pipeline: is missing" in str(refused(write("model: {}\n")))


def test_a_secret_is_not_in_the_error_about_it(write: Write) -> None:
    for value in ("[hunter2]", "{hunter2: 1}", "12345"):
        error = refused(write(BASE + f"kafka: {{sasl_password: {value}}}\n"))
        assert "kafka.sasl_password: " in str(error)
        assert "hunter2" not in str(error)
        assert "12345" not in str(error)
    environ = {"KAFKA_SASL_PASSWORD": "hunter2"}
    assert "hunter2" not in str(refused(write(BASE), environ=environ))


# ---- files that are none ---------------------------------------------------------------------


def test_a_missing_file_is_answered_with_the_nearest(write: Write) -> None:
    path = write(BASE)
    error = refused(path.with_name("toi.yaml"))
    assert error.message == "there is no such file"
    assert error.hint == "did you mean toy.yaml?"
    assert "cannot be read" in str(refused(path.parent))


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", "toy.yaml", "empty"),
        ("# only a comment\n", "toy.yaml", "empty"),
        ("- a\n- b\n", "toy.yaml:1", "expected a mapping"),
        ("just words\n", "toy.yaml:1", "expected a mapping"),
        ("a: 1\nb: [1, 2\nc: 3\n", "toy.yaml:3", "not YAML"),
        ("a: 1\n\tb: 2\n", "toy.yaml:2", "not YAML"),
        ("a: 1\n---\nb: 2\n", "toy.yaml:2", "not YAML"),
        ("a: *b\n", "toy.yaml:1", "not YAML"),
        ("a: \x01\n", "toy.yaml", "not YAML"),
        ("kafka: {bootstrap: ${HOSTS}}\n", "toy.yaml:1", 'put it in quotes: "${NAME}"'),
        ("x: " + "[" * 400_000, "toy.yaml:1", "more than 32 levels"),
        ("a: &a [*a]\n", "toy.yaml:1", "more than"),
        ("a: &a {<<: *a}\n", "toy.yaml:1", "more than"),
    ],
)
def test_a_text_that_is_no_pipeline_says_why(
    write: Write, text: str, place: str, words: str
) -> None:
    error = str(refused(write(text)))
    assert f"{place}: " in error
    assert words in error


def test_aliases_of_aliases_do_not_fill_the_memory(write: Write) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    assert "alias of aliases" in str(refused(write(bomb)))


def test_deep_brackets_do_not_end_the_process(write: Write) -> None:
    """The C parser recurses while it composes: unguarded, 50 000 brackets are a crash."""
    code = "import sys; from streaminfer.spec import load; load(sys.argv[1])"
    path = write("x: " + "[" * 400_000 + "]" * 400_000)
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1
    assert "more than 32 levels" in done.stderr


def test_a_huge_or_binary_file_is_not_parsed(write: Write, tmp_path: Path) -> None:
    assert "more than 1000000 bytes" in str(refused(write("#" * 1_000_001)))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"a: 1\nb: \xff\xfe\x00")
    assert refused(path).where.endswith("weights.safetensors:2")


def test_aliases_and_merges_save_typing(write: Write) -> None:
    text = BASE.replace("{name: stem,", "{batch: &big {max: 64, wait: 1ms}, name: stem,")
    text = text.replace("{name: head}", "{name: head, batch: {<<: *big, wait: 9ms}}")
    text = text.replace("{name: trunk-1,", "{batch: *big, name: trunk-1,")
    spec = loaded(write(text))
    assert spec.batch_of("trunk-1") == spec.batch_of("stem")
    assert (spec.batch_of("stem").max, spec.batch_of("stem").wait) == (64, 0.001)
    assert (spec.batch_of("head").max, spec.batch_of("head").wait) == (64, 0.009)
    error = refused(write(BASE + "spare: &spare {max: 1}\nbatch: *spare\n"))
    assert error.where.endswith("toy.yaml:7: spare")  # an anchor stands where its value is meant


def test_what_yaml_would_turn_into_something_else_stays_a_text(write: Write) -> None:
    text = BASE.replace("8, 8]}", "8, 8], version: 2026-11-24, kwargs: {day: 2026-11-24, 3: x}}")
    model = loaded(write(text)).first_model
    assert model.version == "2026-11-24"
    assert model.kwargs == {"day": "2026-11-24", "3": "x"}


# ---- ${VAR} ----------------------------------------------------------------------------------


def test_variables_are_put_in(write: Write) -> None:
    text = BASE + (
        'kafka: {prefix: "${TEAM}.si", partitions: "${N:-4}", bootstrap: "${KAFKA}"}\n'
        'output: {topic: "${OUT:-answers}"}\n'
    )
    spec = loaded(write(text), environ={"TEAM": "vision", "KAFKA": "k:1"})
    assert (spec.kafka.prefix, spec.kafka.partitions) == ("vision.si", 4)
    assert (spec.kafka.bootstrap, spec.output.topic) == ("k:1", "answers")
    spec = loaded(write(text), environ={"TEAM": "vision", "N": "", "OUT": "o"})
    assert (spec.kafka.partitions, spec.output.topic) == (4, "o")
    assert spec.kafka.bootstrap is None  # everything in one process


def test_a_variable_that_is_not_set_is_named_with_its_line(write: Write) -> None:
    path = write(BASE + "output:\n  topic: ${OUT}\n")
    error = refused(path)
    assert error.where.endswith("toy.yaml:8: output.topic")
    assert "no OUT" in error.message
    assert "${OUT:-default}" in error.hint
    # what a flag gives need not be in the environment
    assert loaded(path, {"output.topic": "x"}).output.topic == "x"


@pytest.mark.parametrize("text", ["${", "${A", "${a b}", "${1}", "${A-x}", "${}"])
def test_a_broken_reference_is_not_taken_as_a_text(write: Write, text: str) -> None:
    error = refused(write(BASE + f"metrics:\n  host: '{text}'\n"), environ={"A": "x"})
    assert "toy.yaml:8: metrics.host" in str(error)
    assert "is no variable" in str(error)


def test_a_reference_can_be_written_as_a_text(write: Write) -> None:
    spec = loaded(write(BASE + "metrics: {host: '$${X} $5'}\n"))
    assert spec.metrics.host == "${X} $5"


def test_free_keys_get_the_type_that_was_written(write: Write) -> None:
    model = "8, 8], kwargs: {a: '${N}', b: x}}"
    text = BASE.replace("8, 8]}", model) + "edges: {}\n"
    assert loaded(write(text), environ={"N": "3"}).first_model.kwargs == {"a": "3", "b": "x"}
    text = BASE.replace(
        'model: {factory: "toy.py:build", example: [3, 8, 8]}',
        "model:\n  factory: toy.py:build\n  example: [3, 8, 8]\n  kwargs:\n    classes: ${N}",
    )
    assert loaded(write(text), environ={"N": "3"}).first_model.kwargs == {"classes": 3}


# ---- precedence ------------------------------------------------------------------------------


def test_flag_over_environment_over_file_over_default(write: Write) -> None:
    path = write(BASE + "kafka: {bootstrap: file:1, prefix: file}\n")
    environ = {"KAFKA_BOOTSTRAP_SERVERS": "plain:1"}
    assert loaded(path).kafka.bootstrap == "file:1"
    assert loaded(path, environ=environ).kafka.bootstrap == "plain:1"
    environ["STREAMINFER_KAFKA__BOOTSTRAP"] = "ours:1"
    assert loaded(path, environ=environ).kafka.bootstrap == "ours:1"
    flags = {"kafka.bootstrap": "flag:1"}
    assert loaded(path, flags, environ).kafka.bootstrap == "flag:1"
    assert loaded(path, flags, environ).kafka.prefix == "file"


def test_origins_tell_who_won(write: Write) -> None:
    path = write(BASE + "kafka:\n  prefix: file\n  partitions: 3\n")
    environ = {"STREAMINFER_KAFKA__PREFIX": "env", "KAFKA_BOOTSTRAP_SERVERS": "k:1"}
    won = origins(path, {"kafka.partitions": "5"}, environ)
    assert won["kafka.bootstrap"] == "environment KAFKA_BOOTSTRAP_SERVERS"
    assert won["kafka.prefix"] == "environment STREAMINFER_KAFKA__PREFIX"
    assert won["kafka.partitions"] == "flag"
    assert won["kafka.replication"] == "default"
    assert won["pipeline"] == f"{path}:1"
    assert won["stages"] == f"{path}:3"
    assert won["stages.trunk-1.until"] == f"{path}:5"
    assert won["stages.trunk-1.device"] == "default"
    assert won["memory"] == "default"
    path = write(BASE)
    assert origins(path, {"batch": "{max: 3}"}, {})["batch.max"] == "flag"
    assert origins(path, {"batch": "{max: 3}"}, {})["batch.wait"] == "default"


def test_every_kafka_variable_that_clients_know_is_read(write: Write) -> None:
    environ = {
        "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:1",
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
        "KAFKA_SASL_USERNAME": "null",
        "KAFKA_SASL_PASSWORD": "[12345]",
        "KAFKA_SSL_CAFILE": "ca.pem",
        "KAFKA_SSL_CERTFILE": "cert.pem",
        "KAFKA_SSL_KEYFILE": "key.pem",
        "KAFKA_SSL_CHECK_HOSTNAME": "false",
    }
    kafka = loaded(write(BASE), environ=environ).kafka
    assert (kafka.bootstrap, kafka.security_protocol) == ("a:1,b:1", "SASL_SSL")
    assert (kafka.sasl_mechanism, kafka.sasl_username) == ("SCRAM-SHA-256", "null")
    assert kafka.sasl_password
    assert kafka.sasl_password.get_secret_value() == "[12345]"
    assert (kafka.ssl_cafile, kafka.ssl_certfile) == ("ca.pem", "cert.pem")
    assert kafka.ssl_keyfile == "key.pem"
    assert kafka.ssl_check_hostname is False


def test_texts_of_flags_and_environment_become_what_the_key_needs(write: Write) -> None:
    path = write(BASE + "input: {crop: 8}\n")
    flags = {
        "input.crop": "null",
        "input.mean": "[0.5, 0.5, 0.5]",
        "input.std": "[1, 1, 1]",
        "model.kwargs.classes": "10",
        "model.kwargs.weights": "null",
        "model.kwargs.name": "x",
        "stages.trunk-1.device": "cuda:1",
        "stages.head.batch.max": "2",
        "edges.head.dtype": "float16",
        "memory": "1GiB",
    }
    environ = {
        "STREAMINFER_INPUT__CHANNELS": "3",
        "STREAMINFER_BATCH__WAIT": "9ms",
        "STREAMINFER_STAGES__TRUNK_1__REPLICAS": "2",
        "STREAMINFER_EDGES__TRUNK_1__COMPRESS": "lz4",
        "STREAMINFER_PIPELINE": "other",
        "STREAMINFER_METRICS__PORT": "",  # empty is not set
        "STREAMINFER_TEST_KAFKA": "not ours",
        "STREAMINFER_PORT_9464_TCP": "a cluster's, not ours",
    }
    spec = loaded(path, flags, environ)
    assert (spec.input.crop, spec.input.mean) == (None, (0.5, 0.5, 0.5))
    assert spec.first_model.kwargs == {"classes": 10, "weights": None, "name": "x"}
    trunk, head = spec.stages[1:]
    assert (trunk.device, trunk.replicas, trunk.name) == ("cuda:1", 2, "trunk-1")
    assert head.batch
    assert head.batch.max == 2
    assert (spec.edge("head").dtype, spec.edge("trunk-1").compress) == ("float16", "lz4")
    assert (spec.batch.wait, spec.memory, spec.pipeline) == (0.009, 2**30, "other")


@pytest.mark.parametrize(
    ("flags", "environ", "where", "words"),
    [
        ({"kafka.partitons": "3"}, {}, "flag: kafka.partitons", "did you mean partitions?"),
        ({"stages.heat.device": "cpu"}, {}, "flag: stages.heat.device", "did you mean head?"),
        ({"stages.head": "x"}, {}, "flag: stages.head", "name a key of the stage"),
        ({"batch.max": "x"}, {}, "flag: batch.max", "expected a whole number"),
        ({"batch": "[" * 400_000 + "]"}, {}, "flag: batch", "expected a mapping"),
        ({"batch": "{max: 3"}, {}, "flag: batch", "expected a mapping"),
        ({"memory.x": "3"}, {}, "flag: memory", "expected a size"),
        (
            {},
            {"STREAMINFER_KAFKA__PARTITIONS": "x"},
            "environment STREAMINFER_KAFKA__PARTITIONS: kafka.partitions",
            "expected a whole number",
        ),
        (
            {},
            {"STREAMINFER_KAFFKA__PREFIX": "x"},
            "environment STREAMINFER_KAFFKA__PREFIX: kaffka",
            "did you mean kafka?",
        ),
    ],
)
def test_a_wrong_override_is_blamed_not_the_file(
    write: Write, flags: Mapping[str, str], environ: Mapping[str, str], where: str, words: str
) -> None:
    error = str(refused(write(BASE), flags, environ))
    assert where in error
    assert words in error


def test_reading_a_file_does_not_wait_for_torch(write: Write) -> None:
    code = (
        "import sys; from streaminfer.spec import load; load(sys.argv[1]);"
        "import streaminfer.topology; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(write(BASE))], check=True, timeout=60, cwd=ROOT)
