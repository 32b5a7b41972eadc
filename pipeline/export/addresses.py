"""How a file that is exported names the pictures: as addresses, and as paths inside an archive."""

import re
from urllib.parse import quote

from pipeline.errors import DataError


def picture_address(prefix: str | None, key: str) -> str:
    """The key behind the prefix; where the prefix is a web address, with the key's special characters escaped.

    `s3://...`, `gs://...` and paths of files take keys as they are. Label Studio's local files (`/data/...?d=`) are a
    web address too.
    """
    if prefix is None:
        return key
    is_web = prefix.startswith(("http://", "https://")) or "?d=" in prefix
    return prefix + (quote(key) if is_web else key)


def relative_path(key: str) -> str:
    """The path below a folder that stands for a key: a URI without `s3://`, an absolute path without its slash.

    A key with a step `..` would leave the folder (on Windows a backslash parts steps too), and one with NUL would be
    cut there: both are a DataError.
    """
    path = key.split("://", 1)[-1].lstrip("/")
    if ".." in re.split(r"[/\\]", path) or "\0" in path:
        raise DataError(f"The key {key!r} has a step `..`, which would leave the folder when the archive is unpacked, "
                        "or a NUL. Give the picture another name, or export to a format of one file.")
    return path
