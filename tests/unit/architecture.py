"""Rules of the tree as functions of a directory: each returns its violations as lines to read."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

CHAIN = ("features", "models", "streaming", "serving", "tessera")
"""Packages in order: each imports only what stands left of it."""
MOST_MODULES = 15
WIDE = ("tessera/cli", "tessera/bench/methods")
"""Folders that may hold more than `MOST_MODULES` modules."""
MOST_PARAMETERS, MOST_OPTIONS = 8, 18
FACE_SHARE = 1 / 3
"""Largest share of the lines that `tessera` may hold."""


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        name: Dotted name; a package's is that of its folder.
        path: Path relative to the root, with slashes.
        lines: Number of lines.
        tree: The parsed source.
    """

    name: str
    path: str
    lines: int
    tree: ast.Module


class Sources:
    """The source files of the five packages under a root."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted(file for package in CHAIN for file in (root / package).rglob("*.py")):
            relative = path.relative_to(root)
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text(encoding="utf-8")
            self.modules[name] = Module(name, relative.as_posix(), text.count("\n"), ast.parse(text))

    @cached_property
    def imports(self) -> list[tuple[str, str]]:
        """Pairs of a module and a module of ours that it imports, imports inside functions included."""
        return sorted(
            (module.name, found)
            for module in self.modules.values()
            for found in {self._module(name) for name in _imported(module.tree)}
            if found
        )

    def _module(self, name: str) -> str:
        """The module that a dotted name means: the name itself, or its parent where the name is a class's."""
        parent = name.rpartition(".")[0]
        return name if name in self.modules else parent if parent in self.modules else ""


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def against_the_chain(sources: Sources) -> list[str]:
    """Imports of a package that stands further right in the chain."""
    place = CHAIN.index
    return [
        f"{user} imports {used}"
        for user, used in sources.imports
        if place(user.partition(".")[0]) < place(used.partition(".")[0])
    ]


def circles(sources: Sources) -> list[str]:
    """Pairs of children of one folder, files or folders, that reach each other by imports, at any depth."""
    edges: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for user, used in sources.imports:
        one, other = user.split("."), used.split(".")
        depth = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        # A package's own __init__ and its modules are one child.
        if depth is not None:
            edges[".".join(one[:depth])][one[depth]].add(other[depth])
    found = []
    for folder, graph in sorted(edges.items()):
        reached = {child: _reached(graph, child) for child in graph}
        found += [
            f"{folder or 'the root'}: {child} and {other} import each other"
            for child in sorted(graph)
            for other in sorted(reached[child])
            if child < other and child in reached.get(other, set())
        ]
    return found


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def wide_folders(sources: Sources) -> list[str]:
    """Folders with more than `MOST_MODULES` modules, but for `WIDE`."""
    count: dict[str, int] = defaultdict(int)
    for module in sources.modules.values():
        folder, _, file = module.path.rpartition("/")
        count[folder] += file != "__init__.py"
    return [
        f"{folder} holds {n} modules" for folder, n in sorted(count.items()) if n > MOST_MODULES and folder not in WIDE
    ]


def repeated_classes(sources: Sources) -> list[str]:
    """Public classes of the same name in several modules."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in sources.modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module.path)
    return [f"class {name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]


def long_signatures(sources: Sources) -> list[str]:
    """Functions with more than `MOST_PARAMETERS` parameters, and commands with more than `MOST_OPTIONS`."""
    found = []
    for module in sources.modules.values():
        most = MOST_OPTIONS if module.path.startswith("tessera/cli/") else MOST_PARAMETERS
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > most:
                    found.append(f"{module.path}:{node.lineno}: {node.name} takes {count} parameters")
    return found


def heavy_face(sources: Sources) -> list[str]:
    """The share of `tessera` in the lines, if it is above `FACE_SHARE`."""
    lines: dict[str, int] = defaultdict(int)
    for module in sources.modules.values():
        lines[module.name.partition(".")[0]] += module.lines
    share = lines["tessera"] / max(sum(lines.values()), 1)
    return [f"tessera holds {share:.1%} of the lines"] if share > FACE_SHARE else []
