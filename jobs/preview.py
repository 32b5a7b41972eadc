"""Keypoint dataset -> one HTML page and a contact sheet: choose pictures, fetch them, draw, write."""

import hashlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.record import record_run
from pipeline import drawing, preview, shards, storage
from pipeline.annotation_input import LIST, SHARDS, describe_input
from pipeline.config import PreviewConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.images import PictureLimits, PictureRefused, decode_picture
from pipeline.keypoints import KeypointMetadata, read_keypoints
from pipeline.pose.skeleton import Skeleton

logger = logging.getLogger("jobs.preview")
PAGE, SHEET = "index.html", "contact_sheet.jpg"
ABOUT = {
    "worst": "Pictures with the persons of the lowest score: where to look for mistakes.",
    "best": "Pictures with the persons of the highest score.",
    "random": "Persons drawn by chance: what the dataset is like.",
}
NUM_LISTING_THREADS = 16

PictureReader = Callable[[str], bytes]


def run(config: PreviewConfig) -> dict[str, Any]:
    """Write the page and the sheet; gives their places and how many pictures are on them."""
    config = locations(config, "keypoints", "output", "images")
    page_uri, sheet_uri = storage.join(config.output, PAGE), storage.join(config.output, SHEET)
    _refuse_existing(page_uri, sheet_uri)
    table, metadata = read_keypoints(config.keypoints)
    chosen = preview.choose_pictures(table, num_pictures=config.pictures, seed=config.seed)
    keys = {choice.key for choices in chosen.values() for choice in choices}
    read = _picture_reader(config, metadata, keys)
    cards = {name: tuple(_card(choice, table, metadata.skeleton, read) for choice in choices)
             for name, choices in chosen.items()}
    images = _drawn(cards, config)
    page = preview.write_page(_page(table, metadata, cards))
    # the page last: what it stands for is whole then
    _put(sheet_uri, drawing.jpeg_bytes(drawing.contact_sheet(images)))
    _put(page_uri, page.encode())
    logger.info("%d pictures drawn; open %s", len(images), page_uri)
    record_run(config.tracking, "preview", counts={"pictures": len(images)},
               params={"keypoints": config.keypoints, "output": config.output, "seed": config.seed})
    return {"output": page_uri, "contact_sheet": sheet_uri, "pictures": len(images),
            "not_readable": len(keys) - len(images)}


def _refuse_existing(*uris: str) -> None:
    for uri in uris:
        if storage.exists(uri):
            raise ConfigError(f"{uri} is there already, and nothing is ever replaced. Choose another --output.")


def _put(uri: str, data: bytes) -> None:
    if not storage.put_if_absent(uri, data):
        _refuse_existing(uri)


def _drawn(cards: dict[str, tuple[preview.Card, ...]], config: PreviewConfig) -> list[drawing.Image]:
    """The pictures that could be had; DataError if there should be some, and none could."""
    every = [card for section in cards.values() for card in section]
    images = [card.image_bgr for card in every if card.image_bgr is not None]
    if every and not images:
        raise DataError(f"none of {len(every)} pictures could be read. The first: {every[0].note} "
                        "Give --images, the place where they are now.")
    return images


def _page(table: pa.Table, metadata: KeypointMetadata,
          cards: dict[str, tuple[preview.Card, ...]]) -> preview.Page:
    return preview.Page(
        model=metadata.model,
        counts=metadata.counts,
        skeleton_name=metadata.skeleton.name,
        joint_scores=preview.mean_joint_scores(table, metadata.skeleton),
        histogram=preview.score_histogram(table),
        score_meaning=" ".join(f"{name.capitalize()} score: {meaning}."
                               for name, meaning in metadata.json.get("scores", {}).items()),
        sections=tuple(preview.Section(name.capitalize(), ABOUT[name], own) for name, own in cards.items()),
        rejected=preview.rejected_pictures(table),
    )


# --- the pictures -----------------------------------------------------------------------------------------


def _card(choice: preview.Choice, table: pa.Table, skeleton: Skeleton, read: PictureReader) -> preview.Card:
    """The chosen picture with its persons drawn, or a card that says why it isn't to be had."""
    persons = table.filter(pc.equal(table["key"], choice.key))
    scores = tuple(persons["score"].to_pylist())
    try:
        image = _decoded(read(choice.key), persons["sha256"][0].as_py())
    except (PictureRefused, *storage.ABOUT_THE_OBJECT) as error:
        return preview.Card(choice.key, None, scores, choice.person_index, note=str(error))
    drawn = drawing.draw_picture(image, persons, skeleton, chosen=choice.person_index)
    return preview.Card(choice.key, drawn, scores, choice.person_index)


def _decoded(data: bytes, sha256: str | None) -> drawing.Image:
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise PictureRefused("changed", "the picture isn't the one that was annotated: its SHA-256 differs.")
    return decode_picture(data, PictureLimits())


def _picture_reader(config: PreviewConfig, metadata: KeypointMetadata,
                    keys: Collection[str]) -> PictureReader:
    """How to get a picture's bytes by its key: from the dataset's own input, or from --images."""
    source = describe_input(config.images) if config.images else metadata.json["input"]
    if source["kind"] == SHARDS:
        found = dict(_sharded_pictures(shards.open_shards(source["uri"], source.get("version")), keys))
        return lambda key: _found(found, key, source["uri"])
    if source["kind"] == LIST:
        return storage.read_object  # a list's keys are whole URIs
    return lambda key: storage.read_object(storage.join(source["uri"], key))


def _found(found: dict[str, bytes | None], key: str, uri: str) -> bytes:
    data = found.get(key)
    if data is None:
        raise PictureRefused("missing", f"the shard dataset {uri} has no bytes of this picture.")
    return data


def _sharded_pictures(dataset: shards.ShardDataset,
                      keys: Collection[str]) -> Iterator[tuple[str, bytes | None]]:
    """Key and bytes of the wanted pictures; of the other shards only the keys are read."""
    wanted = pa.array(sorted(keys), pa.string())

    def holds(part: shards.ShardPart) -> bool:
        listed = shards.read_part_columns(dataset, part, ["key"])
        return bool(pc.any(pc.is_in(listed["key"], wanted)).as_py())

    with ThreadPoolExecutor(NUM_LISTING_THREADS) as threads:
        held = list(threads.map(holds, dataset.parts))
    for part in itertools.compress(dataset.parts, held):
        rows = shards.read_part_columns(dataset, part, ["key", "bytes"])
        for row in rows.filter(pc.is_in(rows["key"], wanted)).to_pylist():
            yield row["key"], row["bytes"]
