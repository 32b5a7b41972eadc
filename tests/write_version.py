"""Write a tiny shard dataset, model directory and keypoint dataset in the present formats, to be kept for ever.

    python -m tests.write_version tests/versions/vN
"""

import sys
import tempfile
from pathlib import Path

from jobs import annotate, shard
from pipeline.config import AnnotateConfig, ShardConfig
from tests.worlds import NO_TRACKING, write_pictures, write_tiny_model


def main(folder: Path) -> None:
    """Shard three made pictures and a text file, and annotate them with an untrained model."""
    with tempfile.TemporaryDirectory() as made:
        pictures = write_pictures(Path(made), count=3)
        (pictures / "images" / "notes.txt").write_text("no picture")
        shard.run(ShardConfig(images=f"{pictures}/images", annotations=f"{pictures}/annotations.json",
                              output=str(folder / "shards"), images_per_shard=3, tracking=NO_TRACKING))
    write_tiny_model(folder / "model")
    annotate.run(AnnotateConfig(input=str(folder / "shards"), model=str(folder / "model"),
                                output=str(folder / "keypoints"), max_rejected_share=1, actors=1,
                                tracking=NO_TRACKING))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
