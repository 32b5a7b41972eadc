"""The whole line in one command: pictures -> shards -> model -> keypoints in Parquet -> COCO numbers -> a page.

Without `data` it makes its own pictures, of drawn figures with known joints; with `data` it takes a folder like
COCO's (`images/`, `annotations/person_keypoints_{train,val}.json`). A photograph is then annotated with the model that
comes with the project, since what a minute's training on figures gives knows no people.
"""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from jobs import annotate, evaluate, preview, shard, train
from jobs.start_ray import start_ray
from pipeline import config as settings
from pipeline import tracking
from pipeline.errors import ConfigError

logger = logging.getLogger("jobs.demo")
RECIPE = Path(__file__).with_name("demo.yaml")
MODEL_NAME, ALIAS = "pose-demo", "champion"
SHIPPED_MODEL = Path(__file__).parents[1] / "models" / "mspn-small-coco17"  # its README says what it can do
PHOTOGRAPH = "grace_hopper.jpg"  # matplotlib's sample of a photograph: one person, in the public domain (US Navy)
VAL_PICTURES = 48
IMAGES_PER_SHARD = 32


def run(config: settings.DemoConfig) -> dict[str, Any]:
    """Run every job of the line in turn; gives the COCO numbers and where to look."""
    output = Path(config.output).resolve()
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty. Remove it to see the demo from the beginning, or give another "
                          "--output.")
    output.mkdir(parents=True, exist_ok=True)
    followed = tracking.located(config.tracking)
    began = time.monotonic()
    with start_ray():
        train_set, val_set = _made_pictures(config, output) if config.data is None else _own_pictures(config)
        for split, (images, annotations) in (("train", train_set), ("val", val_set)):
            _say(f"Sharding the {split} pictures")
            shard.run(settings.ShardConfig(
                images=images, annotations=annotations, output=str(output / "shards" / split),
                annotated_only=True, images_per_shard=IMAGES_PER_SHARD, tracking=followed))
        _say("Training a small MSPN")
        trained = train.run(_recipe(config, output, followed))
        _say("Annotating the val pictures")
        annotated = annotate.run(settings.AnnotateConfig(
            input=str(output / "shards" / "val"), model=f"models:/{MODEL_NAME}@{ALIAS}",
            output=str(output / "keypoints"), tracking=followed))
        _say("Evaluating")
        numbers = evaluate.run(settings.EvaluateConfig(keypoints=str(output / "keypoints"), annotations=val_set[1],
                                                       tracking=followed))
        page = _page(output, "", followed)
        _say("Annotating a photograph with the model that comes with the project")
        photograph = annotate.run(settings.AnnotateConfig(
            input=_photograph(output), model=str(SHIPPED_MODEL), boxes="whole-image",
            output=str(output / "photograph-keypoints"), tracking=followed))
        photograph_page = _page(output, "photograph-", followed)
    _say(f"Done in {time.monotonic() - began:.0f} s. Look at {page} and {photograph_page}, "
         f"or follow the run with: .venv/bin/mlflow ui --backend-store-uri {followed.uri}")
    return {"job": "demo", "output": str(output), "train": trained, "annotate": annotated, "evaluate": numbers,
            "page": page, "photograph": photograph, "photograph_page": photograph_page}


def _page(output: Path, name: str, followed: settings.TrackingConfig) -> str:
    """The page of `<name>keypoints`."""
    preview.run(settings.PreviewConfig(keypoints=str(output / f"{name}keypoints"),
                                       output=str(output / f"{name}preview"), tracking=followed))
    return str(output / f"{name}preview" / "index.html")


def _photograph(output: Path) -> str:
    """A folder with one photograph of one person."""
    import matplotlib

    folder = output / "pictures" / "photograph"
    folder.mkdir(parents=True)
    shutil.copy(Path(matplotlib.get_data_path()) / "sample_data" / PHOTOGRAPH, folder)
    return str(folder)


def _made_pictures(config: settings.DemoConfig, output: Path) -> tuple[tuple[str, str], tuple[str, str]]:
    """(images, annotations) of a training and a validation set, drawn now."""
    from pipeline.figures import write_made_dataset

    _say(f"Drawing {config.pictures + VAL_PICTURES} pictures")
    sets = []
    for split, count, first_id in (("train", config.pictures, 1), ("val", VAL_PICTURES, 1_000_001)):
        folder = output / "pictures" / split
        write_made_dataset(folder, num_pictures=count, seed=0, first_id=first_id)
        sets.append((str(folder / "images"), str(folder / "annotations.json")))
    return sets[0], sets[1]


def _own_pictures(config: settings.DemoConfig) -> tuple[tuple[str, str], tuple[str, str]]:
    """(images, annotations) of the two sets of a folder like COCO's."""
    root = Path(str(config.data))
    files = [root / "annotations" / f"person_keypoints_{split}.json" for split in ("train", "val")]
    missing = [str(path) for path in (root / "images", *files) if not path.exists()]
    if missing:
        raise ConfigError(f"DATA={root}: {', '.join(missing)} isn't there. Expected images/ and "
                          "annotations/person_keypoints_train.json and person_keypoints_val.json.")
    return (str(root / "images"), str(files[0])), (str(root / "images"), str(files[1]))


def _recipe(config: settings.DemoConfig, output: Path, followed: settings.TrackingConfig) -> settings.TrainConfig:
    assignments = [] if config.iterations is None else [f"optimiser.iterations={config.iterations}"]
    return settings.load_config(settings.TrainConfig, files=[str(RECIPE)], assignments=assignments, flags={
        "data": str(output / "shards" / "train"), "val": str(output / "shards" / "val"),
        "output": str(output / "model"), "register": MODEL_NAME, "promote": ALIAS,
        "tracking": followed.model_dump()})


def _say(text: str) -> None:
    logger.info("=== %s", text)
