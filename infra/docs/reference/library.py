"""The names of `from tessera import …`, each rendered from its docstring by mkdocstrings."""

from collections.abc import Iterator


def public() -> Iterator[tuple[str, str]]:
    """Yields each public name and the full path of what it names."""
    import tessera

    for name in getattr(tessera, "__all__", ()):
        found = getattr(tessera, name)
        module = getattr(found, "__module__", None)
        if module is not None:
            yield name, f"{module}.{found.__qualname__}"


def names() -> str:
    """Returns a directive of mkdocstrings for each name."""
    return "\n\n".join(
        f"::: {path}\n    options:\n      heading: tessera.{name}\n      toc_label: {name}" for name, path in public()
    )
