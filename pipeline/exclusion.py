"""Keys that are left out of a plan (`--exclude`), and what was found of them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EXAMPLES = 3


class Exclusion:
    """Takes listed keys out of tables; once these have gone through, it knows which keys were there.

    keys  distinct, sorted
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self.keys = sorted(set(keys))
        self._keys = pa.array(self.keys, pa.string())
        self._found = np.zeros(len(self.keys), bool)
        self._one_kept: str | None = None
        self._all_seen = False

    def without(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The tables less the rows whose `key` is listed; those of which nothing is left are left out."""
        for table in tables:
            left = self._left_of(table) if self.keys else table
            if len(left):
                yield left
        self._all_seen = True

    def counts(self) -> dict[str, int]:
        """How many were left out, and how many of the keys are of nothing that was there; {} without keys.

        The latter can't be told (and is not there) where a limit has ended the plan before the input's end.
        """
        if not self.keys:
            return {}
        found = int(self._found.sum())
        return {"excluded": found} | ({"excluded_unknown": len(self.keys) - found} if self._all_seen else {})

    def doubt(self) -> str | None:
        """What to ask the user about keys of nothing that was there, with examples."""
        unknown = [key for key, found in zip(self.keys, self._found, strict=True) if not found]
        if not unknown or not self._all_seen:
            return None
        some = f"{len(unknown)} of the {len(self.keys)}"
        if len(unknown) == len(self.keys):
            some = f"nothing is left out: all {len(unknown)}"
        return (f"{some} keys are of no object here, such as {', '.join(map(repr, unknown[:EXAMPLES]))}; a key here is "
                f"{self._one_kept!r}. If they are meant for this input, spell them so.")

    def _left_of(self, table: pa.Table) -> pa.Table:
        places = pc.index_in(table["key"], self._keys)
        self._found[places.drop_null().to_numpy()] = True
        left = table.filter(places.is_null())
        if len(left) and self._one_kept is None:
            self._one_kept = left["key"][0].as_py()
        return left
