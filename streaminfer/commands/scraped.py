"""What running workers say of themselves: their /metrics, over HTTP."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from statistics import fmean

from streaminfer.errors import ConfigError
from streaminfer.metrics import Reading, parse
from streaminfer.planning.live import Look

__all__ = ["look"]

PATIENCE = 5.0  # seconds for one address


async def look(urls: Sequence[str], where: str = "") -> Look:
    """Read all of them at once.

    Raises:
        ConfigError: one does not answer, or not with metrics; `where` says who named it.
    """
    answers = await asyncio.gather(*[asyncio.to_thread(_fetch, url, where) for url in urls])
    return Look(
        fmean(at for at, _ in answers), [reading for _, readings in answers for reading in readings]
    )


def _fetch(url: str, where: str) -> tuple[float, list[Reading]]:
    """Return when the metrics were read there, by this clock, and what they are."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310 - checked: http
            at = time.monotonic()  # it begins to answer once it has read them
            text = answer.read().decode("utf-8", "replace")
        return at, list(parse(text))
    except ValueError as error:
        raise ConfigError(f"no metrics: {error}", where=where) from None
    except (urllib.error.URLError, OSError) as error:
        raise ConfigError(
            f"{url}: {getattr(error, 'reason', error)}",
            where=where,
            hint="is it running? `streaminfer targets PIPELINE` lists what runs here",
        ) from None
