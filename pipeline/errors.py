"""What goes wrong, by who can mend it: the command, the input's content, or the store. Our own mistake is an `assert`.

`StorageError` itself is about the *service* (time-outs, 5xx, credentials, a full disk), which a later run can mend;
its four kinds are about one *object*, and become that picture's row.
"""


def printable(text: str) -> str:
    """The text for a terminal or a log, whatever names of pictures are in it.

    What doesn't print is escaped: control characters speak to the terminal, and those that turn the direction of
    writing show another name. Later lines are indented, so that none passes for a line of its own.
    """
    lines = ("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in text.split("\n"))
    return "\n    ".join(lines)


class ConfigError(ValueError):
    """The command or its configuration is wrong; nothing was started (exit code 2)."""


class BucketMissing(ConfigError):
    """There is no such bucket, or can be none of this name."""


class DataError(ValueError):
    """An input's content is wrong: the message names the input, what was found, and the remedy (exit code 1)."""


class StorageError(OSError):
    """The store could not be used: the message names the object and what the store said. Running again may help."""


class ObjectMissing(StorageError):
    """There is no such object."""


class ObjectChanged(StorageError):
    """The object is there, but it is not the one that was planned (another ETag)."""


class ObjectTooLarge(StorageError):
    """The object has more bytes than whoever reads it takes."""


class ObjectForbidden(StorageError):
    """The store refuses this object and gives others: it is about the object, and not about us."""
