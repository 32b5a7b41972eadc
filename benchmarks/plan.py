"""How far `plan`'s wall time is from that of the run that it predicts, in pairs of plan and run.

    python -m benchmarks.plan --data ../shared/data/coco17_mini --model DIR [--pictures 2000] [--pairs 3]

The val pictures of FOLDER (like COCO's), many times under other names, with their annotated boxes. Ray's start is in
neither time.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.annotate import read_pictures, repeated_pictures, run_job
from jobs import plan
from jobs.start_ray import start_ray
from pipeline.config import PlanConfig, TrackingConfig


def main() -> int:
    """Print each pair and the median of their ratios."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    ratios = []
    with tempfile.TemporaryDirectory() as folder, start_ray():
        output = Path(folder)
        read_pictures(options.data, output)
        source = repeated_pictures(output, options.pictures)
        for pair in range(options.pairs):
            predicted = plan.run(PlanConfig(input=source, model=str(options.model),
                                            tracking=TrackingConfig(enabled=False)))["predicted"]["seconds"]
            run = run_job(output / f"run-{pair}", options.model, source, boxes=None)
            ratios.append(predicted / run.seconds)
            print(f"predicted {predicted:.1f} s, took {run.seconds:.1f} s: {ratios[-1]:.2f}", flush=True)
    print(f"median of {len(ratios)}: {statistics.median(ratios):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
