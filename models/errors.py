"""The one error of this room: a model that cannot be read, in one line that names file, place and remedy."""

from __future__ import annotations

from pathlib import Path


class ModelFileError(Exception):
    """A model file, folder or name that cannot be read.

    path: the file.  what: field, offset and value found.  expected: what it may be.  hint: what to do.
    """

    def __init__(self, path: str | Path, what: str, expected: str = "", hint: str = "") -> None:
        self.path, self.what, self.expected, self.hint = str(path), what, expected, hint
        parts = (f"{path}: {what}", f"expected {expected}" if expected else "", hint)
        # file contents may be quoted here: one line whatever they hold
        super().__init__(" ".join("; ".join(part for part in parts if part).split()))
