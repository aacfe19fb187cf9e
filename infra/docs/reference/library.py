"""The names of `from tessera import …`, each rendered from its docstring by mkdocstrings."""

from collections.abc import Iterator

# The order of use; other names follow.
_FIRST = ("load_dataset", "Dataset", "check", "run", "RunOptions", "RunResult", "load_bundle", "Bundle", "Client")


def public() -> Iterator[tuple[str, str]]:
    """Yields each public name and the full path of what it names."""
    import tessera

    for name in sorted(tessera.__all__, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        found = getattr(tessera, name)
        module = getattr(found, "__module__", None)
        if module is not None:
            yield name, f"{module}.{found.__qualname__}"


def names() -> str:
    """Returns a directive of mkdocstrings for each name."""
    return "\n\n".join(
        f"::: {path}\n    options:\n      heading: tessera.{name}\n      toc_label: {name}" for name, path in public()
    )
