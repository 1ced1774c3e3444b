"""WHAT the user declares: the pipeline file, its values, its checks, and how it is read.

units.py     "16MB", "4ms", names      models.py  the file as frozen models, stages.py  its stages
checks.py    what may not stand together          file.py  file < environment < flags
problems.py  pydantic's errors in plain words     tree.py  YAML with lines and ${VAR}
"""

from streaminfer.spec.checks import Problem, did_you_mean
from streaminfer.spec.file import load, origins
from streaminfer.spec.models import (
    EdgeSpec,
    EdgesSpec,
    InputSpec,
    KafkaSpec,
    MetricsSpec,
    OutputSpec,
    PipelineSpec,
    json_schema,
)
from streaminfer.spec.stages import BatchSpec, ModelSpec, StageSpec, TensorExample
from streaminfer.spec.units import Duration, Size, parse_duration, parse_size

__all__ = [
    "BatchSpec",
    "Duration",
    "EdgeSpec",
    "EdgesSpec",
    "InputSpec",
    "KafkaSpec",
    "MetricsSpec",
    "ModelSpec",
    "OutputSpec",
    "PipelineSpec",
    "Problem",
    "Size",
    "StageSpec",
    "TensorExample",
    "did_you_mean",
    "json_schema",
    "load",
    "origins",
    "parse_duration",
    "parse_size",
]
