"""Writes tests/trained_tiny: the smallest MSPN, trained for a minute until it knows 12 drawn pictures.

    python -m tests.write_trained tests/trained_tiny

Tests only ask that it is better on them than an untrained one.
"""

import sys
import tempfile
from pathlib import Path

import torch

from pipeline import samples, training
from pipeline.model.directory import save_model
from tests.test_training import SPEC, Run, blocks_of, made_shards, step

ITERATIONS, BATCH_SIZE, RATE = 600, 16, 1e-2

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = made_shards(Path(folder), num_shards=3)
        run = Run(data)
        training.scale_heatmaps(run.network, 8.0)
        batches = samples.cut_batches((block for _, block in blocks_of(data)), BATCH_SIZE)
        for iteration in range(1, ITERATIONS + 1):
            step(run.network, run.optimiser, training.as_batch(next(batches), torch.device("cpu")), iteration, RATE)
        save_model(Path(sys.argv[1]), run.network, SPEC)
