"""What there is to shard: the objects under a prefix or of a list, those that are wanted, streamed as tables."""

import fnmatch
import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice

import pyarrow as pa

from pipeline import storage
from pipeline.ahead import map_ahead
from pipeline.errors import DataError
from pipeline.inventory import NEITHER_LIST_NOR_PREFIX, is_list, read_list
from pipeline.shard_plan import listed_tables
from pipeline.storage import StoredObject


class Listing:
    """The wanted objects, as tables; after them it knows how many there were (`count`), and how many annotated.

    include    a pattern of names, such as '*.jpg'
    limit      the first so many by name
    annotated  the names of annotated pictures
    """

    def __init__(self, images: str, *, include: str | None, limit: int | None, annotated: Collection[str],
                 annotated_only: bool) -> None:
        self.images, self.include, self.limit = images, include, limit
        self.annotated, self.annotated_only = annotated, annotated_only
        self.count = self.num_annotated = 0

    def tables(self) -> Iterator[pa.Table]:
        """The objects (shard_plan.LISTED), streamed. DataError where there are none, or none that is annotated."""
        for table in listed_tables(self._limited(self._wanted())):
            self.count += len(table)
            self.num_annotated += sum(key in self.annotated for key in table["key"].to_pylist())
            yield table
        if not self.count and not is_list(self.images) and storage.exists(self.images):
            raise DataError(f"{self.images}: {NEITHER_LIST_NOR_PREFIX}")
        if not self.count:
            raise DataError(f"{self.images}: nothing to shard is there. Check the prefix, --include and the "
                            "annotations.")
        if self.annotated and not self.num_annotated:
            raise DataError(f"{self.images}: none of the {self.count} objects is annotated. The annotations speak of "
                            f"{next(iter(self.annotated))!r}: choose --images so that names below it are spelled so.")

    def _wanted(self) -> Iterator[StoredObject]:
        for found in objects_of(self.images):
            named = self.include is None or fnmatch.fnmatchcase(found.name, self.include)
            if named and (not self.annotated_only or found.name in self.annotated):
                yield found

    def _limited(self, objects: Iterator[StoredObject]) -> Iterable[StoredObject]:
        if self.limit is None:
            return objects
        if is_list(self.images):  # in any order
            return heapq.nsmallest(self.limit, objects, key=lambda found: found.name.encode())
        return islice(objects, self.limit)


def objects_of(images: str) -> Iterator[StoredObject]:
    """The objects under a prefix, or of a list, whose names are whole URIs."""
    if not is_list(images):
        yield from storage.list_objects(images)
        return
    for table in read_list(images):
        rows = zip(*(table[name].to_pylist() for name in ("uri", "etag", "size")), strict=True)
        if table["etag"].null_count or table["size"].null_count:
            yield from map_ahead(_known_object, rows)
        else:  # a thread for each of millions that are known costs 20 us an object
            yield from (StoredObject(uri, uri, size, etag) for uri, etag, size in rows)


def locator(images: str) -> Callable[[str], str]:
    """key -> URI, for a prefix or for a list."""
    return (lambda key: key) if is_list(images) else (lambda key: storage.join(images, key))


def _known_object(listed: tuple[str, str | None, int | None]) -> StoredObject:
    """A list's entry, and what it doesn't say asked of the store; that stays unknown where the object isn't there."""
    uri, etag, size = listed
    if etag is None or size is None:
        found = storage.describe_object(uri)
        etag, size = (found.etag, found.size) if found else (etag, size)
    return StoredObject(uri, uri, size, etag)  # type: ignore[arg-type]  # NULL in the plan: what isn't known
