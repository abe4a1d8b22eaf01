"""What is told to people, apart from pydantic: ``fastalign doctor`` has to run without it."""


class ConfigError(ValueError):
    """A recipe, override or data problem that the user can mend: one line, exit code 2."""
