"""The command that shows every setting and who set it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

__all__ = ["config_text"]


def config_text(pipeline: Path, flags: dict[str, str], *, origin: bool, as_json: bool) -> str:
    """Return every setting; with `origin`, and which of flag, environment, file won."""
    from streaminfer.spec.file import load, origins

    values = load(pipeline, flags).model_dump(mode="json")
    won = origins(pipeline, flags) if origin else {}
    if as_json:
        return json.dumps({"values": values, "origins": won} if origin else values)
    rows = [f"{key} = {json.dumps(value)}" + (f"   # {won.get(key, 'default')}" if origin else "")
            for key, value in _flat(values)]  # fmt: skip
    return "\n".join(rows)


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
