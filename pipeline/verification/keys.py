"""Which keys occur in more than one part, of millions and in bounded memory: by 8 bytes of each key's SHA-256."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.verification.finding import WRITER, Finding, some

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


class HasKeys(Protocol):
    """What is known of a part that was read: its name in its folder, and the hashes of its keys, each once."""

    @property
    def name(self) -> str: ...

    @property
    def key_hashes(self) -> Hashes: ...


def no_hashes() -> Hashes:
    """uint64 [0]."""
    return np.empty(0, np.uint64)


def hash_keys(keys: Iterable[str]) -> Hashes:
    """uint64 [n], sorted: the first 8 bytes of each key's SHA-256. 50 million keys are 400 MB."""
    digests = b"".join(hashlib.sha256(key.encode()).digest()[:8] for key in keys)
    return np.sort(np.frombuffer(digests, ">u8").astype(np.uint64))


def all_hashes(parts: Iterable[HasKeys]) -> Hashes:
    """The hashes of all parts' keys, sorted."""
    return np.sort(np.concatenate([no_hashes(), *(part.key_hashes for part in parts)]))


def repeated(ordered: Hashes) -> Hashes:
    """Those that occur more than once among sorted hashes."""
    again: Hashes = ordered[1:][ordered[1:] == ordered[:-1]]
    return again


def among(hashes: Hashes, ordered: Hashes) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool [n]: which of the hashes are in `ordered`. np.isin takes 16 s for one among 10 million, this nothing."""
    if not len(ordered):
        return np.zeros(len(hashes), bool)
    nearest = ordered[np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)]
    return np.equal(nearest, hashes)


def homes_of(suspects: Hashes, folder_uri: str, parts: Sequence[HasKeys],
             dropped: Mapping[str, frozenset[str]] = MappingProxyType({})) -> dict[str, list[str]]:
    """The parts in which each key of these hashes is live: the keys themselves, since two may share a hash.

    dropped  keys that don't count, by part
    """
    homes: dict[str, list[str]] = defaultdict(list)
    if not len(suspects):
        return homes
    wanted, ordered = set(suspects.tolist()), np.sort(suspects)
    for part in parts:
        if not among(part.key_hashes, ordered).any():
            continue
        with storage.arrow_file(storage.join(folder_uri, part.name), remedy="Run again.") as file:
            keys = set(pq.read_table(file, columns=["key"])["key"].to_pylist())
        for key in keys - dropped.get(part.name, frozenset()) - {None}:
            if int(hash_keys([key])[0]) in wanted:
                homes[key].append(part.name)
    return homes


def doubled_keys(homes: Mapping[str, Sequence[str]], folder: str, expected: str) -> Iterator[Finding]:
    """A finding for each two parts that have the same keys, from what `homes_of` gives."""
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, parts in sorted(homes.items()):
        for part in parts[1:]:
            pairs[part, parts[0]].append(repr(key))
    for (part, other), keys in sorted(pairs.items()):
        yield Finding("doubled", f"{folder}/{part}", expected, f"{some(keys)} in {folder}/{other} too", WRITER)
