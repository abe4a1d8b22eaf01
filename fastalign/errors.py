"""What is told to people, apart from pydantic: ``fastalign doctor`` has to run without it."""

from __future__ import annotations

from fastalign.printing import one_line


class ConfigError(ValueError):
    """A recipe, override or data problem that the user can mend: one line, exit code 2."""

    def __init__(self, message: str) -> None:
        # It quotes files of strangers.
        super().__init__(one_line(message))
