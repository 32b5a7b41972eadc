"""The disk's side of `storage`: files in a folder, with the same names, order and errors as objects in a bucket."""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, ObjectChanged, ObjectForbidden, ObjectMissing, ObjectTooLarge, StorageError
from pipeline.listing import StoredObject

if TYPE_CHECKING:
    import pyarrow.fs

logger = logging.getLogger("pipeline.storage")
SHA256_ATTRIBUTE = "user.sha256"
_RENAME_NOREPLACE = 1  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def list_objects(prefix_uri: str) -> Iterator[StoredObject]:
    """Every file under the folder, ordered by the bytes of its path; one folder's names are in memory at a time.

    Files whose names begin with a dot are left out, and so is what is not a file. Links to files are followed; links
    to folders are not, and each is warned of. A link that leads nowhere is listed: reading it says ObjectMissing. What
    vanishes under way is left out; a folder that may not be read is a StorageError.
    """
    levels = [("", iter(_names_in_order(prefix_uri)))]
    while levels:
        folder, names = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
        elif name.endswith("/"):
            levels.append((folder + name, iter(_names_in_order(f"{prefix_uri}/{folder}{name}"))))
        elif not name.startswith("."):
            found = _stored_object(folder + name, f"{prefix_uri.rstrip('/')}/{folder}{name}")
            if found is not None:
                yield found


def read(uri: str, etag: str | None, neighbours: Sequence[str], own_sha256: bool, max_bytes: int | None) -> bytes:
    """The file's bytes. A disk says of each file whether it may be read, and checks what it reads by itself."""
    with _opened(uri, etag) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise ObjectTooLarge(f"{size} bytes, and the limit is {max_bytes}")
        return file.read()


def read_range(uri: str, start: int, length: int, etag: str | None) -> bytes:
    """Some of the file's bytes."""
    with _opened(uri, etag) as file:
        file.seek(start)
        return file.read(length)


def describe(uri: str) -> StoredObject | None:
    """The file's size and etag; None unless it is a file."""
    try:
        status = os.stat(uri)
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise StorageError(f"{uri}: nothing can be known of the file: {error.strerror}.") from error
    except ValueError:  # a NUL, which a name in a bucket may have
        return None
    return _described(os.path.basename(uri), uri, status) if stat.S_ISREG(status.st_mode) else None


def sha256(uri: str) -> str:
    """The digest that was kept when the file was written, if it is that file still; otherwise counted."""
    with _opened(uri, None) as file:
        kept = _kept_sha256(file.fileno())
        return kept or hashlib.file_digest(file, "sha256").hexdigest()


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write a dot-file beside it, fsync, give it its name by a hard link, fsync the folder; whether that was ours."""
    path = Path(uri)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            _keep_sha256(file.fileno(), data)
        committed = _link_exclusively(temporary, path)
        _fsync_folder(path.parent)
        return committed
    except OSError as error:
        remedy = " Make room there, and run again." if error.errno in _FULL else ""
        raise StorageError(f"{path}: writing {len(data)} bytes failed: {error.strerror}.{remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove(uri: str) -> None:
    """Remove a temporary of our own, if it is there."""
    try:
        os.unlink(uri)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{uri}: removing it failed: {error.strerror}. Remove it by hand.") from error


def remove_folder(uri: str) -> None:
    """Remove the folder if it is empty."""
    with contextlib.suppress(OSError):
        os.rmdir(uri)


def arrow_filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """pyarrow's filesystem for local paths, and the path."""
    import pyarrow.fs

    return pyarrow.fs.LocalFileSystem(), uri


def arrow_failure(uri: str, error: OSError) -> StorageError | None:
    """What the system said; an error without its number is about the content."""
    return None if error.errno is None else _reading_failed(uri, error)


def _names_in_order(folder: str) -> list[str]:
    # with "/" behind folders' names, the order within each folder gives the order of the bytes of whole paths
    try:
        with os.scandir(folder) as entries:
            names = [entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder}: the folder may not be listed: {error.strerror}.") from error
    return sorted(names, key=os.fsencode)


def _stored_object(name: str, path: str) -> StoredObject | None:
    try:
        status = os.stat(path)
    except OSError:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: nothing can be known of the file: {error.strerror}.") from error
    if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
        return _described(name, path, status)
    if stat.S_ISDIR(status.st_mode):
        logger.warning("%s: a link to a folder, which is not followed. Give what it leads to as an input of its own.",
                       path)
    return None


def _described(name: str, path: str, status: os.stat_result) -> StoredObject:
    return StoredObject(name, path, status.st_size, _etag(status))


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


@contextlib.contextmanager
def _opened(path: str, etag: str | None) -> Iterator[BufferedReader]:
    if "\0" in path:  # a name in a bucket may have it
        raise ObjectMissing(f"{path!r}: no file can have this name.")
    try:
        with open(path, "rb") as file:
            if etag is not None and _etag(os.fstat(file.fileno())) != etag:
                raise ObjectChanged(f"{path}: the file is no longer the one that was listed (size or time differ).")
            yield file
    except StorageError:
        raise
    except OSError as error:
        raise _reading_failed(path, error) from error


def _reading_failed(path: str, error: OSError) -> StorageError:
    if isinstance(error, PermissionError):
        return ObjectForbidden(f"{path}: the file may not be read ({error.strerror}).")
    if error.errno in _MISSING:
        return ObjectMissing(f"{path}: there is no such file.")
    return StorageError(f"{path}: reading failed: {error.strerror}.")


def _keep_sha256(descriptor: int, data: bytes) -> None:
    # size and time go with it: an edit in place keeps the attribute, which then is no longer the file's
    kept = f"{hashlib.sha256(data).hexdigest()} {_etag(os.fstat(descriptor))}"
    with contextlib.suppress(OSError, AttributeError):  # not every filesystem has attributes, nor every system
        os.setxattr(descriptor, SHA256_ATTRIBUTE, kept.encode())


def _kept_sha256(descriptor: int) -> str | None:
    try:
        kept = os.getxattr(descriptor, SHA256_ATTRIBUTE).decode("ascii", "replace")
    except (OSError, AttributeError):
        return None
    digest, _, etag = kept.partition(" ")
    return digest if etag == _etag(os.fstat(descriptor)) and len(digest) == 64 else None


def _link_exclusively(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    return _rename_exclusively(temporary, path)


def _rename_exclusively(temporary: Path, path: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = (os.fsencode(temporary), os.fsencode(path))
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
            return True
        if ctypes.get_errno() == errno.EEXIST:
            return False
    raise ConfigError(f"{path.parent}: this filesystem offers neither hard links nor renameat2(RENAME_NOREPLACE), so "
                      "that a file can't be put only if absent. Write to a local disk or to object storage.")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
