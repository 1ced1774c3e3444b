"""A model as torch.export has saved it: a `.pt2` file, captured already."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from streaminfer.errors import CaptureError

__all__ = ["Archive"]


class Archive(nn.Module):
    """Holds an exported program; called, it is the model that it was made of, in eval mode or not.

    Reading one can unpickle, so it can run what its author wants: whoever asks for it must trust.
    """

    def __init__(self, path: Path) -> None:
        """Read a file.

        Raises:
            CaptureError: there is none, or it is no archive of this version of torch.
        """
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11
                self.exported = torch.export.load(path)
        except Exception as error:
            reason = str(error).partition("\n")[0] or repr(error)
            raise CaptureError(
                f"cannot read this archive: {reason}",
                where=str(path),
                hint="write it with torch.export.save, by this version of torch",
            ) from error
        self.program = self.exported.module(check_guards=False)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call the model."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> Archive:
        """Return itself: what it does was settled when it was exported."""
        self.training = mode
        return self
