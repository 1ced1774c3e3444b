"""The model that a pipeline file names: its factory, called and given weights, or its archive."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from streaminfer.errors import ConfigError
from streaminfer.parallel.archive import Archive
from streaminfer.parallel.capture import model_line
from streaminfer.planning.example import SEED, example_inputs
from streaminfer.planning.source import file_of_factory
from streaminfer.spec import ModelSpec, did_you_mean

__all__ = ["make_model"]

_OF_WEIGHTS = ("weights", "weights_backbone", "pretrained")  # what torchvision calls them
_NETWORK = ("urllib", "requests", "http", "httpx", "huggingface_hub", "socket")


def make_model(
    model: ModelSpec,
    base: Path | None = None,
    *,
    random_weights: bool = False,
    trust: bool = False,
) -> nn.Module:
    """Return the model in eval mode, seeded.

    Args:
        model: what the pipeline file says; `weights` are safetensors, matched strictly.
        base: the folder that relative paths start at.
        random_weights: leave all weights out; batch norms get statistics of random input, without
            which a deep network's outputs hardly differ.
        trust: read `model.file`, though its reader can run what is in it.

    Raises:
        ConfigError: names the key, or the model's file and line, and the remedy.
    """
    if model.file:
        return _archive((base or Path()) / model.file, random_weights, trust)
    with torch.random.fork_rng(devices=[]), _importable(model, base) as load:
        torch.manual_seed(SEED)
        made = _call(model, load(), random_weights)
    made.eval().requires_grad_(requires_grad=False)
    if random_weights:
        _set_statistics(made, model)
    elif model.weights:
        _load_weights(made, (base or Path()) / model.weights)
    return made


def _archive(path: Path, random_weights: bool, trust: bool) -> nn.Module:
    if not trust:
        raise ConfigError(
            f"{path.name} is not read: torch's reader of .pt2 files can unpickle, and so run what "
            "whoever wrote the file wants",
            where="model.file",
            hint="if you trust where it comes from: --trust, or load(…).trusted() in Python; "
            "a factory with safetensors needs no trust",
        )
    if random_weights:
        raise ConfigError(
            "an archive has its weights in it", where="model.file", hint="drop --random-weights"
        )
    return Archive(path)


@contextmanager
def _importable(model: ModelSpec, base: Path | None) -> Iterator[Callable[[], object]]:
    """Give what imports the factory; a file's folder is importable until the model is made.

    Its modules are forgotten afterwards: another pipeline's folder may have modules of that name.
    """
    module, _, attribute = model.factory.rpartition(":")
    name = file_of_factory(model.factory)
    if name is None:
        yield lambda: _attribute(_import(module), module, attribute)
        return
    path = ((base or Path()) / name).resolve()
    before = set(sys.modules)
    sys.path.insert(0, str(path.parent))
    try:
        yield lambda: _attribute(_execute(path), str(path), attribute)
    finally:
        sys.path.remove(str(path.parent))
        for key in set(sys.modules) - before:
            if Path(getattr(sys.modules[key], "__file__", None) or "").parent == path.parent:
                del sys.modules[key]


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"no module {error.name!r}",
            where="model.factory",
            hint="install it; or name a file: path/to/model.py:build",
        ) from error
    except Exception as error:
        raise _raised(f"importing {name}", error) from error


def _execute(path: Path) -> ModuleType:
    name = f"streaminfer_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"no such file: {path}", where="model.factory")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _raised(f"importing {path.name}", error) from error
    return module


def _attribute(module: ModuleType, name: str, attribute: str) -> object:
    value: object = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_")]
            raise ConfigError(
                f"{name} has no {attribute!r}",
                where="model.factory",
                hint=did_you_mean(part, public),
            )
        value = getattr(value, part)
    return value


def _call(model: ModelSpec, factory: object, random_weights: bool) -> nn.Module:
    if not callable(factory):
        raise ConfigError(
            f"{model.factory} is no function or class, but {type(factory).__name__}",
            where="model.factory",
        )
    kwargs = dict(model.kwargs)
    if random_weights:
        kwargs = {k: v for k, v in kwargs.items() if k not in _OF_WEIGHTS}
        if "weights_backbone" in _parameters(factory):
            kwargs["weights_backbone"] = None  # its default is to download
    try:
        made = factory(**kwargs)
    except Exception as error:
        if _is_download(error):
            raise ConfigError(
                f"{model.factory} could not download its weights: {error}",
                where="model.kwargs",
                hint="put them where it looks for them; or --random-weights, to try the pipeline",
            ) from error
        if isinstance(error, TypeError) and not _binds(factory, kwargs):
            raise ConfigError(
                f"{model.factory}: {error}", where="model.kwargs", hint=_signature(factory)
            ) from error
        raise _raised(model.factory, error) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"{model.factory} gave {type(made).__name__}, not a torch.nn.Module",
            where="model.factory",
        )
    return made


def _raised(what: str, error: Exception) -> ConfigError:
    where = model_line(error)
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    return ConfigError(f"{what} raised {type(error).__name__}: {error}", where=where)


def _parameters(factory: Callable[..., object]) -> list[str]:
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return []


def _binds(factory: Callable[..., object], kwargs: Mapping[str, object]) -> bool:
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return True


def _signature(factory: Callable[..., object]) -> str:
    return f"it takes: {', '.join(_parameters(factory)) or 'no arguments'}"


def _is_download(error: BaseException | None) -> bool:
    while error is not None:
        kind = type(error)
        network = kind.__module__.partition(".")[0] in _NETWORK
        if network or isinstance(error, urllib.error.URLError | ConnectionError | TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _load_weights(made: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}",
            where="model.weights",
            hint="weights are safetensors: safetensors.torch.save_model(model, path)",
        ) from error
    try:
        result = made.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes: it lists them all
        raise ConfigError(f"{path}: {error}", where="model.weights") from error
    missing, unexpected = _without_tied(made, result.missing_keys), result.unexpected_keys
    if missing or unexpected:
        parts = [
            f"{word}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for word, keys in (("missing", missing), ("not in the model", unexpected))
            if keys
        ]
        raise ConfigError(f"{path} is not of this model; {'; '.join(parts)}", where="model.weights")


def _without_tied(made: nn.Module, missing: list[str]) -> list[str]:
    """Leave out names of tensors that another name has loaded: safetensors keep tied ones once."""
    tensors = made.state_dict(keep_vars=True)
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if id(tensors[name]) not in loaded]


def _set_statistics(made: nn.Module, model: ModelSpec) -> None:
    norms = [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        rows = example_inputs(model, 16)
        rows[:8].into(made)
        rows[8:].into(made)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
