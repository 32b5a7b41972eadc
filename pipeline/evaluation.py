"""How good keypoint rows are, measured against COCO annotations: the ten COCO numbers, and PCK.

The one importer of pycocotools. It knows nothing of storage, models or runs.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.coco import PERSON_CATEGORY
from pipeline.errors import DataError
from pipeline.export import coco_results, joint_array, person_rows
from pipeline.export.persons import box_array
from pipeline.pose.skeleton import Skeleton

# the order of COCOeval's `stats` for keypoints
COCO_NUMBERS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
PCK_SHARE = 0.2  # of the torso: Sapp & Taskar, MODEC (CVPR 2013); the usual threshold for FLIC and LSP
TORSO = ("left_shoulder", "right_hip")  # the torso's diagonal, as there
SAME_BOX_PX = 0.01  # annotation files keep two decimals

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class JointEvaluation:
    """One joint's line. Without a labelled joint of a matched person, pck and error are None.

    num_labelled  joints labelled (v > 0) on persons that were matched
    pck           share of them within 0.2 torsos, of persons with a torso
    error_px      mean distance in picture pixels
    score         mean joint score over all predicted persons in evaluated pictures
    """

    name: str
    num_labelled: int
    pck: float | None
    error_px: float | None
    score: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_keypoints` measured. A number that has nothing to be measured on is None.

    coco     AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL, each 0..1
    pck      PCK@0.2 by torso over all joints, 0..1; if None, pck_reason says why
    counts   what it was measured on, and what was left out
    """

    coco: dict[str, float | None]
    pck: float | None
    pck_reason: str | None
    joints: tuple[JointEvaluation, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Truth:
    """The keypoint category of a COCO file, each array with one row for each annotation, in its order."""

    image_ids: frozenset[int]
    ids: npt.NDArray[np.int64]
    annotation_images: npt.NDArray[np.int64]
    boxes_xywh: FloatArray
    areas: FloatArray
    crowds: BoolArray
    keypoints: FloatArray  # [A, K, 3]: x, y, visibility


def evaluate_keypoints(table: pa.Table, truth: Mapping[str, Any], *, skeleton: Skeleton) -> Evaluation:
    """The ten COCO numbers and PCK of keypoint rows against a COCO keypoint file (as parsed JSON).

    Evaluated over the truth's pictures for which the table has any row, by image_id, also one for a refused
    picture: what wasn't annotated doesn't count, what was annotated and missed does. COCOeval runs as always
    (20 persons a picture, crowds and persons without keypoints ignored), with the skeleton's sigmas.

    PCK: predicted persons belong to the annotation whose id is their box_id and whose box is theirs (what
    `annotated` boxes give); no matching by overlap is done, so with any other boxes it is None. A joint is
    right within 0.2 times the distance left shoulder to right hip. Persons without both of them labelled, or
    with both at one place, don't count, nor do annotated persons without a row: `counts` says how many.

    Refused with DataError: annotations for other joints or misshapen, a table with none of their pictures.
    """
    known = _read_truth(truth, skeleton)
    evaluated = _evaluated_images(table, known)
    persons = person_rows(table.filter(pc.is_in(table["image_id"], pa.array(sorted(evaluated), pa.int64()))))
    predicted = joint_array(persons, skeleton).astype(np.float64)
    rows, matches = _match_by_box(persons, known)
    pck, pck_reason, joints = _evaluate_joints(predicted, known.keypoints[matches], rows, skeleton)
    return Evaluation(
        coco=_coco_numbers(coco_results(persons, skeleton=skeleton), known, evaluated, skeleton),
        pck=pck,
        pck_reason=pck_reason,
        joints=joints,
        counts=_counts(table, known, evaluated, persons) | {"rows_matched": len(rows)},
    )


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The numbers that exist, by lower-case name (`ap`, `ap50`, ..., `pck`), to be stored."""
    numbers = {name.lower(): value for name, value in evaluation.coco.items()} | {"pck": evaluation.pck}
    return {name: value for name, value in numbers.items() if value is not None}


def joint_metrics(evaluation: Evaluation, skeleton: Skeleton) -> dict[str, float]:
    """PCK of each joint that has one, as `pck_<joint>` by the joint's column name, to be stored."""
    columns = zip(skeleton.columns(), evaluation.joints, strict=True)
    return {f"pck_{column}": joint.pck for column, joint in columns if joint.pck is not None}


def format_evaluation(evaluation: Evaluation) -> str:
    """The evaluation as lines of text for a terminal; what has no value is a dash."""
    counts = evaluation.counts
    names = list(evaluation.coco)
    width = max(len(joint.name) for joint in evaluation.joints)
    lines = [f"{counts['pictures']} pictures, {counts['persons']} annotated persons, "
             f"{counts['predictions']} predicted"]
    lines += [f"not counted: {value} {name.replace('_', ' ')}" for name, value in counts.items()
              if value and name in LEFT_OUT]
    for row in (names[:5], names[5:]):
        lines.append("  ".join(f"{name:<4} {_number(evaluation.coco[name], '6.3f')}" for name in row))
    reason = f"  ({evaluation.pck_reason})" if evaluation.pck_reason else ""
    lines.append(f"PCK@{PCK_SHARE} {_number(evaluation.pck, '.3f')}{reason}")
    lines.append(f"{'joint':<{width}}  labelled    PCK  error px  score")
    lines += [f"{joint.name:<{width}}  {joint.num_labelled:>8}  {_number(joint.pck, '5.3f'):>5}  "
              f"{_number(joint.error_px, '8.2f'):>8}  {_number(joint.score, '5.3f'):>5}"
              for joint in evaluation.joints]
    return "\n".join(lines)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else f"{value:{spec}}"


# --- what is compared --------------------------------------------------------------------------------------

LEFT_OUT = ("truth_images_not_in_table", "pictures_not_in_truth", "rows_without_image_id")


def _evaluated_images(table: pa.Table, truth: _Truth) -> frozenset[int]:
    in_table = {image_id for image_id in pc.unique(table["image_id"]).to_pylist() if image_id is not None}
    evaluated = truth.image_ids & in_table
    if not evaluated:
        raise DataError(
            f"none of the {len(truth.image_ids)} annotated pictures is in the keypoint rows, which have "
            f"{len(in_table)} image_ids ({table['image_id'].null_count} of {table.num_rows} rows have none). "
            "Annotate a shard dataset made with these --annotations, and evaluate against the same file.")
    return evaluated


def _counts(table: pa.Table, truth: _Truth, evaluated: frozenset[int], persons: pa.Table) -> dict[str, int]:
    in_evaluated = np.isin(truth.annotation_images, list(evaluated))
    labelled = (truth.keypoints[..., 2] > 0).any(axis=1)
    in_table = pc.unique(table["image_id"].drop_null()).to_pylist()
    return {
        "pictures": len(evaluated),
        "persons": int((in_evaluated & labelled & ~truth.crowds).sum()),
        "predictions": persons.num_rows,
        "truth_images_not_in_table": len(truth.image_ids - evaluated),
        "pictures_not_in_truth": len(set(in_table) - truth.image_ids),
        "rows_without_image_id": table["image_id"].null_count,
    }


def _read_truth(truth: Mapping[str, Any], skeleton: Skeleton) -> _Truth:
    category = _keypoint_category(truth, skeleton)
    own = [entry for entry in truth["annotations"] if entry.get("category_id") == category]
    num_joints = skeleton.num_joints
    try:
        return _Truth(
            image_ids=frozenset(int(image["id"]) for image in truth["images"]),
            ids=np.array([entry["id"] for entry in own], dtype=np.int64),
            annotation_images=np.array([entry["image_id"] for entry in own], dtype=np.int64),
            boxes_xywh=np.array([entry["bbox"] for entry in own], dtype=np.float64).reshape(-1, 4),
            areas=np.array([_area(entry) for entry in own], dtype=np.float64),
            crowds=np.array([bool(entry.get("iscrowd", 0)) for entry in own], dtype=np.bool_),
            keypoints=np.array([entry.get("keypoints") or [0.0] * 3 * num_joints for entry in own],
                               dtype=np.float64).reshape(-1, num_joints, 3),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the annotations are misshapen ({type(error).__name__}: {error}): each needs id, "
                        f"image_id, bbox of 4 and keypoints of {3 * num_joints} numbers.") from error


def _area(entry: Mapping[str, Any]) -> float:
    """The segment's area, on which OKS depends; without one, the box's, as most converters write it."""
    return float(entry["area"] if "area" in entry else entry["bbox"][2] * entry["bbox"][3])


def _keypoint_category(truth: Mapping[str, Any], skeleton: Skeleton) -> int:
    """The id of the category with the skeleton's joints; DataError without one."""
    missing = [name for name in ("images", "annotations", "categories") if name not in truth]
    if missing:
        raise DataError(f"not a COCO keypoint file: it has no {', '.join(missing)}.")
    categories = [category for category in truth["categories"] if category.get("keypoints")]
    for category in categories:
        if [name.lower() for name in category["keypoints"]] == [name.lower() for name in skeleton.joints]:
            return int(category["id"])
    found = [", ".join(category["keypoints"]) for category in categories]
    raise DataError(f"the keypoint rows have the joints {', '.join(skeleton.joints)}, but the annotations' "
                    f"have {found or 'no keypoints'}. Evaluate against annotations of the same joints.")


# --- the ten COCO numbers ----------------------------------------------------------------------------------


def _coco_numbers(
    results: Sequence[dict[str, Any]], truth: _Truth, evaluated: frozenset[int], skeleton: Skeleton
) -> dict[str, float | None]:
    from pycocotools.cocoeval import COCOeval

    # pycocotools reports its progress with print, and stdout belongs to the job's result
    with contextlib.redirect_stdout(io.StringIO()):
        coco_truth = _coco_index(truth.image_ids, _truth_entries(truth))
        predicted = coco_truth.loadRes(list(results)) if results else _coco_index(truth.image_ids, [])
        evaluator = COCOeval(coco_truth, predicted, "keypoints")
        evaluator.params.imgIds = sorted(evaluated)
        evaluator.params.kpt_oks_sigmas = np.array(skeleton.sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    # COCOeval says -1 where no annotated person is in the range of sizes
    return {name: None if value < 0 else float(value)
            for name, value in zip(COCO_NUMBERS, evaluator.stats, strict=True)}


def _coco_index(image_ids: frozenset[int], annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {
        "images": [{"id": image_id} for image_id in sorted(image_ids)],
        "annotations": annotations,
        "categories": [{"id": PERSON_CATEGORY, "name": "person"}],
    }
    index.createIndex()
    return index


def _truth_entries(truth: _Truth) -> list[dict[str, Any]]:
    """Annotations as COCOeval reads them: our own, since it writes into them.

    Numbered from 1, since it takes an annotation of id 0 for one that was never found.
    """
    labelled = (truth.keypoints[..., 2] > 0).sum(axis=1)
    return [
        {"id": entry + 1, "image_id": int(truth.annotation_images[entry]),
         "category_id": PERSON_CATEGORY, "bbox": truth.boxes_xywh[entry].tolist(),
         "area": float(truth.areas[entry]), "iscrowd": int(truth.crowds[entry]),
         "num_keypoints": int(labelled[entry]), "keypoints": truth.keypoints[entry].ravel().tolist()}
        for entry in range(len(truth.ids))
    ]


# --- PCK ---------------------------------------------------------------------------------------------------


def _match_by_box(persons: pa.Table, truth: _Truth) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and the annotations that they were made from, [m] each: the same id, picture and box.

    The box too, because with detections box_id is an index, which may happen to be some annotation's id.
    """
    box_ids = persons["box_id"].fill_null(-1).to_numpy()
    if not len(truth.ids):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    by_id = np.argsort(truth.ids, kind="stable")
    nearest = by_id[np.minimum(np.searchsorted(truth.ids[by_id], box_ids), len(truth.ids) - 1)]
    same = truth.ids[nearest] == box_ids
    same &= truth.annotation_images[nearest] == persons["image_id"].to_numpy()
    same &= (np.abs(truth.boxes_xywh[nearest] - box_array(persons)) <= SAME_BOX_PX).all(axis=1)
    return np.flatnonzero(same), nearest[same]


def _evaluate_joints(
    predicted: FloatArray, annotated: FloatArray, rows: npt.NDArray[np.int64], skeleton: Skeleton
) -> tuple[float | None, str | None, tuple[JointEvaluation, ...]]:
    """PCK, the reason if there is none, and each joint's line.

    predicted [n, K, 3]; annotated [m, K, 3] of the rows [m] that were matched.
    """
    labelled = annotated[..., 2] > 0
    distances = np.linalg.norm(predicted[rows, :, :2] - annotated[..., :2], axis=-1)
    torsos = _torso_lengths(annotated, skeleton)
    counted = labelled & (torsos > 0)[:, None]
    right = counted & (distances <= PCK_SHARE * torsos[:, None])
    joints = tuple(
        JointEvaluation(
            name=name,
            num_labelled=int(labelled[:, joint].sum()),
            pck=_share(right[:, joint], counted[:, joint]),
            error_px=_mean(distances[labelled[:, joint], joint]),
            score=_mean(predicted[:, joint, 2]),
        )
        for joint, name in enumerate(skeleton.joints)
    )
    pck = _share(right, counted)
    return pck, None if pck is not None else _why_no_pck(len(rows), skeleton), joints


def _torso_lengths(annotated: FloatArray, skeleton: Skeleton) -> FloatArray:
    """Left shoulder to right hip in pixels, [m]; 0 where one of them isn't labelled, or no joint at all."""
    if not set(TORSO) <= set(skeleton.columns()):
        return np.zeros(len(annotated))
    ends = annotated[:, [skeleton.columns().index(name) for name in TORSO]]
    lengths = np.linalg.norm(ends[:, 0, :2] - ends[:, 1, :2], axis=-1)
    return np.where((ends[..., 2] > 0).all(axis=1), lengths, 0.0)


def _why_no_pck(num_matched: int, skeleton: Skeleton) -> str:
    if not set(TORSO) <= set(skeleton.columns()):
        return f"the skeleton {skeleton.name!r} has no {' and '.join(TORSO)} to measure a torso by"
    if not num_matched:
        return "no row's box is an annotated one: PCK needs --boxes annotated"
    return "no matched person has both torso joints labelled"


def _share(part: BoolArray, whole: BoolArray) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None


def _mean(values: FloatArray) -> float | None:
    existing = values[~np.isnan(values)]
    return float(existing.mean()) if len(existing) else None
