"""Levels of loggers, which belong to the whole process and which a command sets."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def levels_kept() -> Iterator[None]:
    """Puts back the level of every logger, so that a later test sees the lines that it waits for."""
    before = {name: logger.level for name, logger in _loggers().items()}
    try:
        yield
    finally:
        for name, logger in _loggers().items():
            logger.setLevel(before.get(name, logging.NOTSET))


def _loggers() -> dict[str | None, logging.Logger]:
    made = logging.Logger.manager.loggerDict.items()
    return {None: logging.getLogger(), **{name: one for name, one in made if isinstance(one, logging.Logger)}}
