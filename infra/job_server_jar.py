"""Writes a jar that holds only a manifest: `job_server_jar.py OUT.jar MAIN_CLASS JARS_DIRECTORY`.

Beam's runners start one jar with `java -jar`. The manifest names the jars of a directory as its class path, so no jar
of all classes is built.
"""

import sys
import zipfile
from pathlib import Path

OPENED = """java.lang java.lang.invoke java.lang.reflect java.io java.net java.nio java.text java.time java.util
java.util.concurrent java.util.concurrent.atomic java.util.concurrent.locks jdk.internal.ref sun.nio.ch sun.nio.cs
sun.security.action sun.util.calendar"""
WIDTH_BYTES = 70
"""Bytes of a line. The format allows 72 with the line's end; a longer value goes on after a space in the next line."""


def manifest(main_class: str, jars: list[Path]) -> str:
    """Returns a manifest that starts a class with these jars."""
    values = {
        "Manifest-Version": "1.0",
        "Main-Class": main_class,
        "Class-Path": " ".join(jar.absolute().as_uri() for jar in jars),
        "Add-Opens": " ".join(f"java.base/{name}" for name in OPENED.split()),
        "Add-Exports": "java.base/sun.net.util java.base/sun.nio.ch java.rmi/sun.rmi.registry",
    }
    return "".join(f"{_folded(f'{name}: {value}')}\r\n" for name, value in values.items()) + "\r\n"


def _folded(line: str) -> str:
    parts = [line[:WIDTH_BYTES]]
    rest = line[WIDTH_BYTES:]
    width = WIDTH_BYTES - 1
    parts += [f" {rest[start : start + width]}" for start in range(0, len(rest), width)]
    return "\r\n".join(parts)


def main() -> None:
    """Writes the jar."""
    out, main_class, directory = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    with zipfile.ZipFile(out, "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", manifest(main_class, sorted(directory.glob("*.jar"))))


if __name__ == "__main__":
    main()
