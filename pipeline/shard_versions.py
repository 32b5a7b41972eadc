"""A shard dataset's versions: what an existing one holds, what is taken out of it, and the sealing of the next.

Each version follows from a frozen job alone (`_job-00000N.json` with its plan), and from what the parts say of
themselves; so whoever seals it writes the same.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import shards, storage
from pipeline.ahead import map_ahead
from pipeline.coco import AnnotatedImage
from pipeline.errors import DataError
from pipeline.hash_buckets import HashBuckets
from pipeline.images import REASONS
from pipeline.pose.skeleton import Skeleton
from pipeline.shard_plan import (
    CONTENT,
    DROPPED,
    DUPLICATE,
    LIVE,
    REQUEST,
    dropped_rows,
    repeated_content,
    spread_by_content,
)
from pipeline.shards import ShardDataset, ShardPart
from pipeline.units import FrozenJob, open_job, part_footers, read_dropped, total_counts

NO_VERSION = ShardDataset("", 0, (), None, DROPPED.empty_table(), {})
CHANGEABLE = pa.array([reason for reason, (_, changeable) in REASONS.items() if changeable])


def job_name(version: int) -> str:
    """The object that freezes the run which makes a version, such as `_job-000001.json`."""
    return f"_job-{version:06d}.json"


def open_version_job(output: str, version: int) -> FrozenJob:
    """The frozen job of a version that exists; DataError where it is gone."""
    job = open_job(output, job_name(version))
    if job is None:
        raise DataError(f"{output}/{job_name(version)} is gone, though version {version} is there. Restore it, or "
                        "shard into a new --output.")
    return job


# --- what an existing version holds -------------------------------------------------------------------------------


def rows_to_compare(base: ShardDataset, images: Mapping[str, AnnotatedImage] | None) -> Iterator[pa.Table]:
    """What a version knows of its objects (LIVE), part by part; copies that were left out as duplicates too.

    images  the annotations, where they aren't those that the version was made with: a picture whose image_id or
            persons differ is made again. So is one whose refusal another try can change.
    """
    everything = _with_duplicates(base)
    columns = ["key", "etag", "size", "sha256", "reason", *(() if images is None else ("image_id", "persons"))]
    for part, table in shards.read_columns(everything, columns):
        again = pc.fill_null(pc.is_in(table["reason"], CHANGEABLE), False)
        if images is not None:
            again = pc.or_(again, pa.array([_differs(row, images.get(row["key"])) for row in table.to_pylist()]))
        names = pa.array([part.name] * len(table), pa.string())
        yield pa.table([*table.select(["key", "etag", "size", "sha256"]).columns, names, again], schema=LIVE)


def _with_duplicates(base: ShardDataset) -> ShardDataset:
    return ShardDataset(base.uri, base.version, base.parts, base.skeleton, permanent(base.dropped), base.json)


def _differs(row: Mapping[str, Any], image: AnnotatedImage | None) -> bool:
    if image is None:
        return row["image_id"] is not None
    return bool(row["image_id"] != image.image_id or row["persons"] != shards.persons_of(image))


def permanent(dropped: pa.Table) -> pa.Table:
    """The dropped rows less duplicates, which each version finds anew: the copy that was kept may be gone."""
    return dropped.filter(pc.not_equal(dropped["why"], DUPLICATE))


def left_out(base: ShardDataset) -> pa.Array:
    """The keys that were taken out on request: they stay out."""
    return base.dropped.filter(pc.equal(base.dropped["why"], REQUEST))["key"].combine_chunks()


def find_rows(base: ShardDataset, keys: Iterable[str], *, source: str) -> pa.Table:
    """The rows to drop on request (DROPPED). Keys that are out already are passed over; an unknown one is refused
    (DataError), since a take-down with a wrong spelling would else look done."""
    wanted = set(keys) - set(left_out(base).to_pylist())
    found = [dropped_rows(table.filter(pc.is_in(table["key"], pa.array(wanted, pa.string()))), REQUEST)
             for table in rows_to_compare(base, None)]
    rows = pa.concat_tables([DROPPED.empty_table(), *found])
    unknown = sorted(wanted - set(rows["key"].to_pylist()))
    if unknown:
        raise DataError(f"{source}: {len(unknown)} keys are in no live row of {base.uri} version {base.version}, such "
                        f"as {', '.join(map(repr, unknown[:3]))}. Nothing was dropped; keys are spelled as in the "
                        "column `key`.")
    return rows


# --- the next version ---------------------------------------------------------------------------------------------


def seal(output: str, version: int, job: FrozenJob, base: ShardDataset, *, skeleton: Skeleton | None,
         source: dict[str, Any], keep_copies: bool) -> None:
    """Write `dataset-00000N.json`, last: from the parts themselves, never from a process's counters.

    Refused with DataError: parts whose rows aren't those that were planned; a version that another job has written.
    """
    new = [job.part_name(unit) for unit in range(job.num_units)]
    counts = dict(zip(new, map(shards.part_counts, part_footers(output, shards.FOLDER, new)), strict=True))
    rows = sum(count["rows"] for count in counts.values())
    if rows != job.plan["pictures"]:
        raise DataError(f"{output}: {job.plan['pictures']} objects were planned, but the parts have {rows} rows.")
    digests = map_ahead(lambda name: storage.stored_sha256(storage.join(output, shards.FOLDER, name)), new)
    added = [ShardPart(name, sha256, counts[name]) for name, sha256 in zip(new, digests, strict=True)]
    dropped = _permanently_dropped(output, job, base)
    everything = ShardDataset(output, version, (*base.parts, *added), skeleton, dropped, {})
    copies = _copies(everything)
    if not keep_copies:
        dropped = pa.concat_tables([dropped, dropped_rows(copies, DUPLICATE)])
    parts = _live_parts(everything, dropped, base)
    total = {**total_counts([part.counts for part in parts]), "duplicates": len(copies) if keep_copies else 0}
    data = shards.dataset_json(parts, version=version, skeleton=skeleton, source=source, counts=total,
                               dropped=_put_dropped(output, version, dropped), changes=job.about.get("changes"))
    if not storage.put_if_absent(storage.join(output, shards.version_name(version)), data):
        _refuse_other_winner(output, version, job)


def _refuse_other_winner(output: str, version: int, job: FrozenJob) -> None:
    winner = open_job(output, job_name(version))
    if winner is None or winner.digest != job.digest:
        raise DataError(f"{output}: another run has made version {version}. Nothing of this one is in it; run "
                        "again, to add what is still missing.")


def _permanently_dropped(output: str, job: FrozenJob, base: ShardDataset) -> pa.Table:
    frozen = read_dropped(output, job)
    return pa.concat_tables([permanent(base.dropped), *([] if frozen is None else [frozen])])


def _copies(everything: ShardDataset) -> pa.Table:
    """The pictures (CONTENT) whose bytes a picture with a smaller key has too."""
    columns = shards.read_columns(everything, ["key", "sha256", "reason"])
    with HashBuckets(CONTENT) as contents:
        spread_by_content((_contents(part, table) for part, table in columns), contents)
        return pa.concat_tables([CONTENT.empty_table(), *repeated_content(contents)])


def _contents(part: ShardPart, table: pa.Table) -> pa.Table:
    pictures = table.filter(pc.is_null(table["reason"]))
    names = pa.array([part.name] * len(pictures), pa.string())
    return pa.table([pictures["sha256"], pictures["key"], names], schema=CONTENT)


def _live_parts(everything: ShardDataset, dropped: pa.Table, base: ShardDataset) -> list[ShardPart]:
    """The parts less those whose rows are all gone for good, with the counts of their live rows."""
    gone, before = _rows_by_part(dropped), _rows_by_part(base.dropped)
    final = ShardDataset(everything.uri, everything.version, everything.parts, None, dropped, {})

    def counted(part: ShardPart) -> ShardPart:
        if gone.get(part.name) == before.get(part.name):
            return part
        table = shards.read_part_columns(final, part, ["key", "reason", "size", "persons"])
        return ShardPart(part.name, part.sha256, shards.count_rows(table.to_pylist()))

    # a part of nothing but duplicates stays: the copy that is kept elsewhere may go
    copies = set(dropped.filter(pc.equal(dropped["why"], DUPLICATE))["part"].to_pylist())
    return [part for part in map_ahead(counted, everything.parts) if part.counts["rows"] or part.name in copies]


def _rows_by_part(dropped: pa.Table) -> dict[str, frozenset[str]]:
    keys: dict[str, list[str]] = {}
    for part, key in zip(dropped["part"].to_pylist(), dropped["key"].to_pylist(), strict=True):
        keys.setdefault(part, []).append(key)
    return {part: frozenset(some) for part, some in keys.items()}


def _put_dropped(output: str, version: int, dropped: pa.Table) -> tuple[str, str] | None:
    """Put the list of rows that don't count, if there are any; its name and SHA-256."""
    if not len(dropped):
        return None
    sink = pa.BufferOutputStream()
    pq.write_table(dropped.sort_by([("part", "ascending"), ("key", "ascending")]), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name, sha256 = f"dropped-{version:06d}.parquet", hashlib.sha256(data).hexdigest()
    uri = storage.join(output, name)
    if not storage.put_if_absent(uri, data) and storage.stored_sha256(uri) != sha256:
        raise DataError(f"{uri} is there already, with another content. Move it elsewhere, and run again.")
    return name, sha256


def look_again_at(locate: Callable[[str], str]) -> Callable[[pa.Table, Any], list[bool]]:
    """A function that reads objects with another ETag, and says which still have the SHA-256 that they had.

    locate  key -> URI. An object that is gone, or another by now, counts as changed: its new row will say what it is.
    """
    def same(pair: tuple[dict[str, Any], str]) -> bool:
        row, sha256 = pair
        try:
            data = storage.read_object(locate(row["key"]), etag=row["etag"])
        except storage.ABOUT_THE_OBJECT:
            return False
        return hashlib.sha256(data).hexdigest() == sha256

    return lambda now, before: list(map_ahead(same, zip(now.to_pylist(), before, strict=True)))
