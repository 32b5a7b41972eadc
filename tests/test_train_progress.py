"""What a training says of itself on its way."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from jobs.train_progress import Progress
from jobs.train_task import Worker
from pipeline import tracking, training
from pipeline.config import TrainConfig


@pytest.mark.parametrize(("loss", "said"), [(1578.23, "loss 1578,"), (0.0012344, "loss 0.001234,")])
def test_a_loss_is_said_in_four_digits_however_small_it_is(loss: float, said: str,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    config: Any = TrainConfig.model_validate({"data": "shards", "output": "model"})
    worker = cast(Worker, SimpleNamespace(task=SimpleNamespace(config=config), rank=0, world=1, iteration=1))
    progress = Progress(worker, cast(tracking.Run, None), last_line=float("-inf"))
    with caplog.at_level(logging.INFO, logger="jobs.train"):
        progress.took(training.StepReport(1, torch.tensor(loss), torch.tensor([[loss]]), torch.tensor([7]),
                                          torch.tensor(1.0)))
    assert said in caplog.text
