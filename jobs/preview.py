"""Keypoint dataset -> one HTML page and a contact sheet: survey, choose pictures, fetch them, draw, write.

The dataset is read once, part by part, by the few columns that count; then the parts that hold the chosen pictures.
Memory doesn't grow with the dataset.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.record import record_run
from pipeline import drawing, storage
from pipeline.annotation_input import SHARDS, describe_input
from pipeline.config import PreviewConfig, locations
from pipeline.errors import ConfigError, DataError
from pipeline.images import PictureLimits, PictureRefused, decode_picture
from pipeline.isolation import IsolatedDecoder
from pipeline.keypoints import KeypointMetadata, KeypointParts, open_keypoints, read_parts
from pipeline.preview.page import Card, Page, Section, write_page
from pipeline.preview.pictures import Fetched, decode_checked, fetch_pictures
from pipeline.preview.strata import BEST, GROUPS, QUARTERS, RANDOM, WORST, Candidate, deal
from pipeline.preview.survey import NUM_PER_REASON, Survey
from pipeline.rows import OK
from pipeline.shards import newest_version
from pipeline.units import total_counts

logger = logging.getLogger("jobs.preview")
Drawing = Callable[..., drawing.Image]  # `draw_picture` of one dataset
PAGE, SHEET = "index.html", "contact_sheet.jpg"
# a section of the page: its name, how its pictures were chosen, from which strata
SECTIONS = (
    ("By score", "Persons from the lowest score of all to the highest: the worst is where to look for mistakes. "
     "Between them some of each quarter of the persons, drawn by chance; the quarters are those of some thousand "
     "persons drawn by chance.", (WORST, *QUARTERS, BEST)),
    ("By number of persons", "Pictures with so many persons, drawn by chance.", tuple(GROUPS)),
    ("Drawn by chance", "Persons drawn by chance from all: what the dataset is like.", (RANDOM,)),
)
REJECTED = ("Rejected", f"Up to {NUM_PER_REASON} pictures of each reason, drawn by chance, as far as they can still be "
            "read. They keep their rows, with the reason and the message.")


def run(config: PreviewConfig) -> dict[str, Any]:
    """Write the page and the sheet; gives their places and how many pictures are on them."""
    config = locations(config, "keypoints", "output", "images")
    page_uri, sheet_uri = storage.join(config.output, PAGE), storage.join(config.output, SHEET)
    _refuse_existing(page_uri)
    parts = open_keypoints(config.keypoints)
    survey, counts = _survey(parts, config)
    chosen, rejected = deal(survey.strata(), config.pictures), survey.rejected()
    rows = _rows(parts, itertools.chain(*chosen.values(), *rejected.values()))
    source = describe_input(config.images) if config.images else _annotated_input(parts.metadata)
    draw = partial(drawing.draw_picture, skeleton=parts.metadata.skeleton, low_score=parts.metadata.low_score)
    cards = _drawn_cards(chosen, rows, source, draw)
    refused = _rejected_cards(rejected, rows, source)
    sections = _sections(cards, refused)
    # the page last: what it stands for is whole then
    images = [card.image_bgr for section in sections for card in section.cards
              if card.image_bgr is not None and not card.rejected]
    _put(sheet_uri, drawing.jpeg_bytes(drawing.contact_sheet(images)))
    _put(page_uri, write_page(_page(parts.metadata, counts, survey, sections)).encode())
    logger.info("%d pictures drawn; open %s", len(images), page_uri)
    record_run(config.tracking, "preview", counts={"pictures": len(images)},
               params={"keypoints": config.keypoints, "output": config.output, "seed": config.seed})
    return {"output": page_uri, "contact_sheet": sheet_uri, "pictures": len(images),
            "not_readable": sum(map(len, cards.values())) - len(images), "rejected": len(refused),
            "complete": parts.metadata.complete}


def _annotated_input(metadata: KeypointMetadata) -> dict[str, Any]:
    source: dict[str, Any] = metadata.json["input"]
    if source["kind"] == SHARDS and not newest_version(source["uri"]):
        raise DataError(f"{source['uri']}: the shard dataset that was annotated isn't there any more. Give --images, "
                        "the place where it, or its pictures, are now.")
    return source


def _refuse_existing(uri: str) -> None:
    if storage.exists(uri):
        raise ConfigError(f"{uri} is there already, and nothing is ever replaced. Choose another --output.")


def _put(uri: str, data: bytes) -> None:
    """Put it; the same bytes may be there of a run that was ended before it put the page."""
    if not storage.put_if_absent(uri, data) and storage.read_object(uri) != data:
        _refuse_existing(uri)


def _survey(parts: KeypointParts, config: PreviewConfig) -> tuple[Survey, dict[str, Any]]:
    """The one pass over all parts; and the totals, by the parts' own counts."""
    survey = Survey(parts.metadata.skeleton, num_pictures=config.pictures, seed=config.seed)
    counts: dict[str, Any] = {}
    for name, own, rows in read_parts(parts, parts.names, survey.columns):
        survey.add(name, rows)
        counts = total_counts([counts, own])
    return survey, counts


def _rows(parts: KeypointParts, candidates: Iterable[Candidate]) -> pa.Table:
    """All rows of the chosen pictures, from the parts that hold them."""
    places = {candidate.key: candidate.part for candidate in candidates}
    keys = pa.array(sorted(places), pa.string())
    found = [rows.filter(pc.is_in(rows["key"], keys)) for _, _, rows in read_parts(parts, sorted(set(places.values())))]
    return pa.concat_tables(found)


def _page(metadata: KeypointMetadata, counts: dict[str, Any], survey: Survey, sections: Sequence[Section]) -> Page:
    return Page(
        model=metadata.model,
        counts=counts,
        skeleton_name=metadata.skeleton.name,
        joints=metadata.skeleton.joints,
        person_scores=survey.person_scores,
        joint_scores=survey.joint_scores,
        persons_per_picture=survey.persons_per_picture,
        low_score=metadata.low_score,
        score_meaning=" ".join(f"{name.capitalize()} score: {meaning}."
                               for name, meaning in metadata.json.get("scores", {}).items()),
        sections=tuple(sections),
    )


def _sections(cards: Mapping[str, Sequence[Card]], rejected: Sequence[Card]) -> list[Section]:
    shown = [Section(name, about, tuple(card for stratum in strata for card in cards[stratum]))
             for name, about, strata in SECTIONS]
    return [*shown, Section(*REJECTED, tuple(rejected))]


# --- the pictures -------------------------------------------------------------------------------------------------


def _drawn_cards(chosen: Mapping[str, Sequence[Candidate]], rows: pa.Table, source: Mapping[str, Any],
                 draw: Drawing) -> dict[str, list[Card]]:
    """A card for each chosen picture, by stratum; DataError if there should be pictures, and none could be read."""
    picked = {candidate.key: (label, candidate) for label, own in chosen.items() for candidate in own}
    cards: dict[str, list[Card]] = {label: [] for label in chosen}
    for key, data in fetch_pictures(source, picked):
        label, candidate = picked[key]
        cards[label].append(_card(label, candidate, data, _rows_of(rows, key), draw))
    every = [card for own in cards.values() for card in own]
    if every and not any(card.image_bgr is not None for card in every):
        raise DataError(f"none of {len(every)} pictures could be read. The first: {every[0].note} "
                        "Give --images, the place where they are now.")
    return cards


def _card(label: str, candidate: Candidate, data: Fetched, rows: pa.Table, draw: Drawing) -> Card:
    """The chosen picture with its persons drawn, or a card that says why it isn't to be had."""
    persons = rows.filter(pc.equal(rows["status"], OK))
    scores = tuple(persons["score"].to_pylist())
    chosen = candidate.person_index if candidate.person_index >= 0 else None
    try:
        image = _decoded(data, rows, lambda read: decode_picture(read, PictureLimits()))
    except (PictureRefused, *storage.ABOUT_THE_OBJECT) as error:
        return Card(candidate.key, label, None, scores, chosen, note=str(error))
    drawn = draw(image, persons, chosen=chosen)
    return Card(candidate.key, label, drawn, scores, chosen)


def _rejected_cards(rejected: Mapping[str, Sequence[Candidate]], rows: pa.Table,
                    source: Mapping[str, Any]) -> list[Card]:
    """A card for each rejected picture: reason, message, and (these first) the picture where it can still be read."""
    reasons = {candidate.key: reason for reason, own in rejected.items() for candidate in own}
    # what was refused once may kill or hang the decoder: in a process of its own
    with IsolatedDecoder(PictureLimits(accept_truncated=True)) as decoder:
        cards = [_rejected_card(key, reasons[key], data, _rows_of(rows, key), decoder)
                 for key, data in fetch_pictures(source, reasons)] if reasons else []
    return sorted(cards, key=lambda card: card.image_bgr is None)


def _rejected_card(key: str, reason: str, data: Fetched, rows: pa.Table, decoder: IsolatedDecoder) -> Card:
    note = rows["error"][0].as_py() or ""
    try:
        image = drawing.shrunk(_decoded(data, rows, decoder.decode))
    except (PictureRefused, storage.StorageError):
        return Card(key, reason, None, note=note, rejected=True)
    return Card(key, reason, image, note=note, rejected=True)


def _decoded(data: Fetched, rows: pa.Table, decode: Any) -> drawing.Image:
    if not isinstance(data, bytes):
        raise data
    return decode_checked(data, rows["sha256"][0].as_py(), decode)


def _rows_of(rows: pa.Table, key: str) -> pa.Table:
    return rows.filter(pc.equal(rows["key"], key))
