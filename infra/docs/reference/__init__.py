"""The generated parts of the reference: each is a function without arguments that returns Markdown.

The code is the only source: help texts of commands, docstrings of configuration, the OpenAPI document, metrics.
"""

from collections.abc import Callable

from infra.docs.reference import command_line, configuration, http_api, library, metrics

PARTS: dict[str, Callable[[], str]] = {
    "commands": command_line.commands,
    "descriptor": configuration.descriptor,
    "run-table": configuration.run_table,
    "http": http_api.routes,
    "python": library.names,
    "metrics-serving": metrics.serving,
    "metrics-stream": metrics.stream,
    "metrics-skew": metrics.skew,
}
