"""How long `preview` looks over a keypoint dataset, and in how much memory, beside reading it whole.

    python -m benchmarks.preview [--persons N ...]

The made datasets of benchmarks.export; each measurement is a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.export import make_dataset
from pipeline.keypoints import open_keypoints, read_keypoints, read_parts
from pipeline.preview.survey import Survey

NUM_PICTURES = 28


def main() -> int:
    """Make the datasets, measure both ways, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--persons", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--only", nargs=2, metavar=("WAY", "DATASET"), help="what each process does")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only)))
        return 0
    print("| | persons | s | s of CPU | MB of memory above the start |\n|---|---|---|---|---|")
    for persons in options.persons:
        with tempfile.TemporaryDirectory() as folder:
            make_dataset(f"{folder}/keypoints", persons)
            for way in ("survey", "read whole"):
                command = [sys.executable, "-m", "benchmarks.preview", "--only", way, f"{folder}/keypoints"]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"| {way} | {persons:,} " + "| {seconds:.1f} | {cpu:.1f} | {peak_mb:.0f} |".format(**result))
    return 0


def measure(way: str, dataset: str) -> dict[str, Any]:
    """Seconds, of the clock and of the CPU; peak of resident memory beyond the imports'."""
    before_mb, begun, begun_cpu = _peak_mb(), time.perf_counter(), time.process_time()
    if way == "survey":
        parts = open_keypoints(dataset)
        survey = Survey(parts.metadata.skeleton, num_pictures=NUM_PICTURES, seed=0)
        for name, _, rows in read_parts(parts, parts.names, survey.columns):
            survey.add(name, rows)
    else:
        read_keypoints(dataset)
    return {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - begun_cpu,
            "peak_mb": _peak_mb() - before_mb}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    sys.exit(main())
