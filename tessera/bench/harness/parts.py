"""Parts of a benchmark that are chosen by name."""

from collections.abc import Sequence

from features.errors import TesseraError


def chosen_parts(bench: str, parts: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Returns the parts to measure, in the benchmark's own order; all by default.

    Raises:
        TesseraError: the benchmark has no part of that name.
    """
    if unknown := [name for name in parts or () if name not in known]:
        raise TesseraError(f"--part {unknown[0]!r}: bench {bench} has the parts {', '.join(known)}")
    return [name for name in known if not parts or name in parts]
