"""The two errors that a user can mend. Our own mistake is an `assert`; trouble with the store, a `StorageError`."""


class ConfigError(ValueError):
    """The command or its configuration is wrong; nothing was started (exit code 2)."""


class DataError(ValueError):
    """An input's content is wrong: the message names the input, what was found, and the remedy (exit code 1)."""
