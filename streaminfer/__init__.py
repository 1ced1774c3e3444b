"""One torch model, cut into stages; every stage an async Kafka consumer on its own device."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaminfer.app import LocalPipeline
    from streaminfer.client import Client, Prediction
    from streaminfer.errors import StreaminferError

__all__ = ["Client", "LocalPipeline", "Prediction", "StreaminferError", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "Client": "streaminfer.client",
    "LocalPipeline": "streaminfer.app",
    "Prediction": "streaminfer.client",
    "StreaminferError": "streaminfer.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import streaminfer` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'streaminfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
