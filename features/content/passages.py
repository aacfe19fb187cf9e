"""Splits a text into sentences and into passages of whole sentences."""

import re
from itertools import pairwise

# A full stop inside a number or an initial ends no sentence: white space or the script's own mark must follow.
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？।])|\n+")
LEAST_WORDS = 4
"""Fewest words of a sentence that can stand alone."""


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, in order. A sentence shorter than `LEAST_WORDS` joins the sentence before it."""
    cuts = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    found: list[str] = []
    for start, end in pairwise(cuts):
        sentence = text[start:end].strip()
        if sentence and found and len(sentence.split()) < LEAST_WORDS:
            found[-1] = f"{found[-1]} {sentence}"
        elif sentence:
            found.append(sentence)
    return found


def passages(text: str, words: int) -> list[str]:
    """Returns passages of at most `words` words, in order; a sentence is cut only if it is longer by itself.

    Args:
        text: The text.
        words: Most words of a passage, at least 1.
    """
    found: list[list[str]] = []
    for sentence in sentences(text):
        own = sentence.split()
        for start in range(0, len(own), words):
            part = own[start : start + words]
            if found and len(found[-1]) + len(part) <= words:
                found[-1].extend(part)
            else:
                found.append(list(part))
    return [" ".join(part) for part in found]
