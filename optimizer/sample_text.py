"""The English text on which precisions are compared: prose, explanations, dialogue, letters, numbers and names.

It was written for this package (optimizer/english.txt): no model has read it, and it may be passed on with the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

TOKENS: Final = 2000
"""How many tokens are compared: the first ones of the text, which has more for every vocabulary that we know."""
NAME: Final = "torchweld's English text"


def english_text() -> str:
    """The whole text, about 1,900 words."""
    return (Path(__file__).parent / "english.txt").read_text("utf-8")
