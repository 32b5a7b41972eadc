"""What it costs that others decode for an annotator, and how many of them one annotator could use.

    python -m benchmarks.decoders --data ../shared/data/coco17_mini [--output DIR]

FOLDER as for `benchmarks.annotate`. All without a network (backend null), one thread each, side by side in one run:

    pools   pictures/s of `annotate`, pool start not counted, by the number of annotators and of decoders before them
    intake  crops/s that one annotator takes in and commits, when decoding is free: a stub gives the same crops again
    wire    what 1,000 persons/s are in bytes/s from machine to machine, by the network's input (arithmetic)
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.annotate import REPETITIONS, made_model, read_pictures, repeated_pictures, run_job
from jobs import annotate_pool
from jobs.start_ray import start_ray
from pipeline.annotation import Opened
from pipeline.model.mspn import MSPNConfig
from pipeline.unit_decoder import DecodedUnit
from pipeline.units import read_unit

PICTURES = 6000
POOLS = ((1, 0), (2, 0), (1, 1), (1, 2))  # annotators, decoders
PERSONS_PER_S = 1000
INPUTS_WH = ((192, 256), (288, 384))


class RepeatingActor(annotate_pool.DecodingActor):
    """Decodes one unit, and gives its crops as every other's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.known: list[Opened] = []
        self.crops = np.empty(0, np.uint8)
        self.decode, self.decoder.decode = self.decoder.decode, self._repeat  # type: ignore[method-assign]

    def _repeat(self, unit: int, earlier_parts: Any = (), *, careful: bool = False) -> DecodedUnit:
        if not self.known:
            first = self.decode(unit, earlier_parts, careful=careful)
            self.known = list(first.pictures.values()) * 2  # a larger unit may come
            self.crops = np.concatenate([first.crops] * 2)
            return first
        keys = [one["key"] for one in read_unit(self.decoder.output, self.decoder.job, unit)]
        known = self.known[:len(keys)]
        renamed = {key: (replace(picture, picture=picture.picture | {"key": key}), persons)
                   for key, (picture, persons) in zip(keys, known, strict=True)}
        return DecodedUnit(renamed, self.crops[:sum(len(picture.boxes.ids) for picture, _ in known)])


def main() -> int:
    """Measure, and print a table of each kind."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    output = options.output or Path(tempfile.mkdtemp(prefix="decoders-"))
    model = made_model(output / "model")
    with start_ray():
        read_pictures(options.data, output)
        source = repeated_pictures(output, PICTURES)
        found: dict[str, list[float]] = {}
        for number in range(REPETITIONS):
            for annotators, decoders in POOLS:
                run = run_job(output / f"out-{number}-{annotators}-{decoders}", model, source, boxes=None,
                              backend="null", threads=1, actors=annotators, decoders=decoders)
                found.setdefault(f"{annotators} + {decoders}", []).append(run.pictures / run.working_s)
            with mock.patch.object(annotate_pool, "DecodingActor", RepeatingActor):
                run = run_job(output / f"intake-{number}", model, source, boxes=None, backend="null", threads=1,
                              actors=1, decoders=1)
            found.setdefault("intake", []).append(run.persons / run.working_s)
            print({name: round(values[-1]) for name, values in found.items()}, file=sys.stderr)
    medians = {name: round(statistics.median(values)) for name, values in found.items()}
    wire = {f"{height}x{width}": f"{PERSONS_PER_S * height * width * 3 / 1e6:.0f} MB/s" for width, height in INPUTS_WH}
    print(json.dumps({"pictures/s, annotators + decoders": {name: medians[name] for name in medians if "+" in name},
                      "crops/s that one annotator takes in": medians["intake"],
                      f"{PERSONS_PER_S} persons/s": wire, "input of the run": MSPNConfig(num_joints=17).input_size_wh},
                     indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
