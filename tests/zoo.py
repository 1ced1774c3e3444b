"""Models that others wrote, and the question whether one is captured, cut and still itself.

torchvision's classification and segmentation models all, timm's and transformers' by family; no
weights are downloaded. Images are as small as a model takes: what is asked does not depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streaminfer.parallel import Program, check_inputs, load, weights
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.program import dump

__all__ = ["ZOO", "Entry", "Result", "attempt", "entries", "evenly", "reload", "run"]

Inputs = Mapping[str, Tensor]  # "" = the one positional input


@dataclass(frozen=True)
class Entry:
    """One model: how it is made, and n rows of what it takes."""

    name: str
    family: str  # torchvision | segmentation | timm | transformers
    make: Callable[[], nn.Module]
    rows: Callable[[int], Inputs]


@dataclass(frozen=True)
class Result:
    """What became of one model."""

    name: str
    family: str
    equal: bool
    seconds: float
    nodes: int = 0
    cuts: int = 0  # legal ones
    gap: float = 0.0  # the largest difference, relative to the largest value
    reason: str = ""  # why it is not equal


# ---- what there is -------------------------------------------------------------------------------

# Pixels a side, where 64 are too few or the size is part of the model.
_PIXELS = {"inception_v3": 96, "maxvit_t": 224}


def _image(pixels: int, channels: int = 3) -> Callable[[int], Inputs]:
    def rows(n: int) -> Inputs:
        generator = torch.Generator().manual_seed(n)
        shades = torch.randn(n, channels, 1, 1, generator=generator)
        return {"": torch.randn(n, channels, pixels, pixels, generator=generator) + shades}

    return rows


def _torchvision() -> Iterator[Entry]:
    for name in torchvision.models.list_models(module=torchvision.models):
        pixels = _PIXELS.get(name, 64)
        options: dict[str, Any] = {"weights": None}
        if name.startswith("vit_"):
            pixels = 56 if name == "vit_h_14" else 64
            options["image_size"] = pixels
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = True
        yield Entry(name, "torchvision", _called(torchvision.models, name, options), _image(pixels))


def _segmentation() -> Iterator[Entry]:
    module = torchvision.models.segmentation
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    for name in torchvision.models.list_models(module=module):
        yield Entry(name, "segmentation", _called(module, name, options), _image(64))
    aux = {**options, "aux_loss": True}
    yield Entry(
        "fcn_resnet50+aux", "segmentation", _called(module, "fcn_resnet50", aux), _image(64)
    )


def _called(module: Any, name: str, options: Mapping[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(module, name)(**options)


_TIMM = {
    "beit_base_patch16_224": 224,
    "cait_xxs24_224": 224,
    "coat_tiny": 224,
    "convmixer_768_32": 64,
    "convnextv2_atto": 64,
    "crossvit_tiny_240": 240,
    "cspresnet50": 64,
    "davit_tiny": 224,
    "deit_tiny_patch16_224": 224,
    "dla34": 64,
    "dpn68": 64,
    "eca_nfnet_l0": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientnetv2_rw_t": 64,
    "fastvit_t8": 64,
    "ghostnet_100": 64,
    "hrnet_w18_small": 64,
    "inception_resnet_v2": 96,
    "levit_128s": 224,
    "mixer_s32_224": 224,
    "mobilevit_xxs": 64,
    "mobilenetv4_conv_small": 64,
    "nf_resnet50": 64,
    "pit_ti_224": 224,
    "poolformer_s12": 64,
    "pvt_v2_b0": 64,
    "regnety_002": 64,
    "repvgg_a0": 64,
    "res2net50_26w_4s": 64,
    "resmlp_12_224": 224,
    "resnest14d": 64,
    "rexnet_100": 64,
    "selecsls42b": 64,
    "seresnet18": 64,
    "skresnet18": 64,
    "swin_tiny_patch4_window7_224": 224,
    "tf_efficientnet_lite0": 64,
    "tnt_s_patch16_224": 224,
    "twins_pcpvt_small": 224,
    "vit_tiny_patch16_224": 224,
    "volo_d1_224": 224,
    "xception41": 64,
    "xcit_nano_12_p16_224": 224,
}


def _timm() -> Iterator[Entry]:
    timm = import_module("timm")
    for name, pixels in _TIMM.items():
        yield Entry(
            name,
            "timm",
            lambda name=name: timm.create_model(name, pretrained=False),  # type: ignore[misc]
            _image(pixels),
        )


_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}
_DISTIL = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 500}
_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500, "n_positions": 64}
_VISION = {**{k: _SMALL[k] for k in list(_SMALL)[:4]}, "image_size": 32, "patch_size": 8}
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert-tiny": ("BertForSequenceClassification", "BertConfig", _SMALL, "text"),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", _SMALL, "text"),
    "bert-base-model": ("BertModel", "BertConfig", _SMALL, "text"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _SMALL, "text"),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL, "text"),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_SMALL, "embedding_size": 32},
        "text",
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_SMALL, "embedding_size": 32},
        "text",
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "use_cache": False}, "text"),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_SMALL, "num_key_value_heads": 2, "use_cache": False},
        "text",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VISION, "image"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _VISION, "image"),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]},
        "image",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 2, 1]},
        "image",
    ),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {}, "image"),
}


def _words(n: int) -> Inputs:
    generator = torch.Generator().manual_seed(n)
    mask = torch.ones(n, 16, dtype=torch.int64)
    for i in range(n):
        mask[i, 16 - i :] = 0  # sentences of several lengths
    return {
        "input_ids": torch.randint(3, 500, (n, 16), generator=generator),
        "attention_mask": mask,
    }


def _pixel_values(n: int) -> Inputs:
    return {"pixel_values": _image(32)(n)[""]}


def _transformers() -> Iterator[Entry]:
    module = import_module("transformers")
    for name, (kind, config, options, takes) in _TRANSFORMERS.items():

        def make(kind: str = kind, config: str = config, options: Any = options) -> nn.Module:
            made = getattr(module, kind)(getattr(module, config)(**options))
            assert isinstance(made, nn.Module)
            return made

        yield Entry(name, "transformers", make, _words if takes == "text" else _pixel_values)


ZOO: Mapping[str, Callable[[], Iterator[Entry]]] = {
    "torchvision": _torchvision,
    "segmentation": _segmentation,
    "timm": _timm,
    "transformers": _transformers,
}


def entries(families: Sequence[str] = tuple(ZOO)) -> list[Entry]:
    """Return the models of some families. Raises ImportError where one is not installed."""
    return [entry for family in families for entry in ZOO[family]()]


# ---- the question --------------------------------------------------------------------------------


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off torch's fused attention of eager mode, which sums in another order."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=before)


def evenly(cutter: Cutter, stages: int) -> list[int]:
    """Return legal cuts for so many stages, evenly spaced among all of them."""
    return [
        cutter.legal[
            (len(cutter.legal) - 1) * k // stages if stages > 2 else len(cutter.legal) // 2
        ]
        for k in range(1, stages)
    ]


def reload(stages: Sequence[StageGraph], folder: Path) -> list[Program]:
    """Write stages and read them back."""
    programs = []
    for i, stage in enumerate(stages):
        file = folder / f"{i}.safetensors"
        weights.write(file, stage.weights)
        programs.append(load(dump(stage), weights.read(file)))
        file.unlink()  # what is mapped stays
    return programs


def run(programs: Sequence[Program], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run stages as workers do: what crosses is contiguous and checked."""
    tensors = inputs
    for program in programs:
        tensors = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        check_inputs(program.inputs, tensors)
        tensors = program(*tensors)
    check_inputs(programs[-1].outputs, tensors)
    return tensors


def prepare(entry: Entry) -> nn.Module:
    """Make a model, seeded, all of whose layers have a say in its outputs.

    Batch norms get statistics of random input; what is begun at zero or nearly so (heads, the last
    norm of a block, layer scales) gets other numbers: else a wrong cut could give the right bits.
    """
    torch.manual_seed(0)
    model = entry.make().eval().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.abs().max() < 1e-3:
            parameter.normal_(0, 0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    if norms:
        with torch.no_grad():
            _call(model, entry.rows(4))
    return model.eval()


def _call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    positional, named = split(inputs)
    leaves = pytree.tree_leaves(model(*positional, **named))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def split(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what goes in by position and what by name."""
    return (
        tuple(t for name, t in inputs.items() if not name),
        {name: t for name, t in inputs.items() if name},
    )


def attempt(
    entry: Entry, folder: Path, stages: Sequence[int] = (2, 3, 4), rows: Sequence[int] = (2, 3)
) -> Result:
    """Capture a model, cut it, write and read its stages, and compare them with the whole."""
    began = time.perf_counter()

    def result(equal: bool, **more: Any) -> Result:
        return Result(entry.name, entry.family, equal, time.perf_counter() - began, **more)

    with plain_attention(), torch.no_grad():
        try:
            model = prepare(entry)
            cutter = Cutter(capture(model, *split(entry.rows(2))))
            found = {"nodes": len(cutter.captured.nodes), "cuts": len(cutter.legal)}
            expected = {n: _call(model, entry.rows(n)) for n in rows}
            if not all(_tells_rows_apart(whole) for whole in expected.values()):
                return result(False, **found, reason="its outputs tell nothing apart")
            if len(cutter.legal) < max(stages) - 1:
                return result(False, **found, reason=f"only {len(cutter.legal)} legal cuts")
            gaps = [
                _gap(expected[n], run(programs, list(entry.rows(n).values())))
                for k in stages
                for programs in [reload(cutter.split(evenly(cutter, k)), folder)]
                for n in rows
            ]
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            return result(False, reason=reason)
    gap = max(gaps)
    return result(gap == 0.0, **found, gap=gap, reason="other bits" if gap else "")


def _tells_rows_apart(outputs: Sequence[Tensor]) -> bool:
    return all(t.isfinite().all() for t in outputs if t.is_floating_point()) and any(
        not torch.equal(t[0], t[1]) for t in outputs
    )


def _gap(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    if len(expected) != len(found):
        return float("inf")
    gaps = [
        0.0
        if torch.equal(a, b)
        else float((a.double() - b.double()).abs().max() / a.double().abs().max())
        for a, b in zip(expected, found, strict=True)
    ]
    return max(gaps)
