"""Persons in pictures -> their joints, with one model on one device: crop, forward, flip test, decode, back.

The same object serves annotation, validation during training, and the model as MLflow stores it. Heatmaps stay on
the device; what comes back is a few numbers for each joint.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.model import inference
from pipeline.model.decode import decode_heatmaps, flip_average
from pipeline.model.directory import ModelSpec, load_model, normalise_crops
from pipeline.model.network import PoseNetwork
from pipeline.pose.crop import CroppedPersons, crop_persons, joints_to_image
from pipeline.pose.skeleton import Skeleton

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PersonKeypoints:
    """Joints of n persons: `joints_xy` float32 [n, K, 2] in picture pixels, `joint_scores` [n, K], `scores` [n]."""

    joints_xy: Array
    joint_scores: Array
    scores: Array


class Predictor:
    """A loaded model that answers with joints.

    backend       how heatmaps are computed (`model.inference`): "cpu", "cuda", "openvino", "plain": the network as it
                  is, where it is; "auto": the fastest that is at hand; "null": not at all, every joint is 0, 0
    precision     of the network, "float32" or "bfloat16"; decoding is as exact as ever
    flip          average with the mirrored picture, as the authors test
    batch_size    crops in one forward pass
    threads       CPU threads of this process; None leaves them as they are. Bits depend on their number.
    compile_mode  torch.compile's, of "cpu" and "cuda"; None: not compiled
    """

    def __init__(self, model: Path | tuple[PoseNetwork, ModelSpec], *, backend: str = "auto",
                 precision: str = "float32", flip: bool = True, batch_size: int = 32, threads: int | None = None,
                 compile_mode: str | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        network, self.spec = load_model(model) if isinstance(model, Path) else model
        network = network.eval()
        backend = inference.fast_backend() if backend == "auto" else backend
        self.null = backend == inference.NULL
        if backend in (inference.PLAIN, inference.NULL):
            self.device = next(network.parameters()).device
            self._heatmaps = inference.plain_heatmaps(network, precision)
        else:
            self.device = torch.device("cuda" if backend == inference.CUDA else "cpu")
            self._heatmaps = inference.fast_heatmaps(network, backend, precision, batch_size=batch_size,
                                                     threads=threads, compile_mode=compile_mode)
        self.flip, self.batch_size = flip, batch_size
        self.skeleton = Skeleton.from_json(self.spec.skeleton)

    def crop_persons(self, image_bgr: Array, boxes_xywh: Array) -> CroppedPersons:
        """The crops of `boxes_xywh` float64 [n, 4] (picture pixels) from a uint8 [H, W, 3] picture."""
        return crop_persons(image_bgr, boxes_xywh, self.spec.input_size_wh, padding_wh=self.spec.box_padding_wh)

    def predict_crops(self, crops: Iterable[Array]) -> tuple[Array, Array]:
        """Joints float32 [N, K, 2] in crop pixels and scores float32 [N, K] of a stream of uint8 [H, W, 3] crops.

        The stream is cut into batches as it comes, so that at most `batch_size` crops are held.
        """
        # a GPU works on one batch while the next is put together: what it gives is waited for one batch later
        waiting: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        answers: list[tuple[Array, Array]] = []
        for batch in self._batches(crops):
            waiting.append(self._predict_batch(batch))
            if len(waiting) > 1:
                answers.append(_on_cpu(waiting.popleft()))
        answers += map(_on_cpu, waiting)
        num_joints = self.skeleton.num_joints
        joints = [np.empty((0, num_joints, 2), np.float32), *(joints for joints, _ in answers)]
        scores = [np.empty((0, num_joints), np.float32), *(scores for _, scores in answers)]
        return np.concatenate(joints), np.concatenate(scores)

    def predict_persons(self, image_bgr: Array, boxes_xywh: Array) -> PersonKeypoints:
        """The joints of the persons in `boxes_xywh` float64 [n, 4] (picture pixels) of one uint8 [H, W, 3] picture."""
        persons = self.crop_persons(image_bgr, boxes_xywh)
        joints, scores = self.predict_crops(persons.crops)
        return PersonKeypoints(self.to_picture(joints, persons), scores, scores.mean(axis=1))

    def to_picture(self, joints_xy: Array, persons: CroppedPersons) -> Array:
        """Joints [n, K, 2] in crop pixels as float32 picture pixels."""
        placed = joints_to_image(joints_xy, persons.centers_xy, persons.sizes_wh, self.spec.input_size_wh)
        return placed.astype(np.float32)

    def _batches(self, crops: Iterable[Array]) -> Iterator[Array]:
        """The crops in batches, uint8 [n, H, W, 3]; they share their memory: each holds until the next is asked for."""
        width, height = self.spec.input_size_wh
        batch = np.empty((self.batch_size, height, width, 3), np.uint8)
        remaining, filled = iter(crops), self.batch_size
        while filled == self.batch_size:
            filled = 0
            for crop in islice(remaining, self.batch_size):
                batch[filled] = crop
                filled += 1
            if filled:
                yield batch[:filled]

    @torch.inference_mode()
    def _predict_batch(self, crops: Array) -> tuple[torch.Tensor, torch.Tensor]:
        if self.null:
            shape = len(crops), self.skeleton.num_joints
            return torch.zeros(*shape, 2), torch.zeros(*shape)
        pixels = torch.from_numpy(crops)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        images = normalise_crops(pixels, self.spec)
        heatmaps = self._heatmaps(images)
        if self.flip:
            heatmaps = flip_average(heatmaps, self._heatmaps(images.flip(-1)), self.skeleton.flip_order,
                                    shift=self.spec.decoding.flip_shift)
        return decode_heatmaps(heatmaps, self.spec.input_size_wh, decoding=self.spec.decoding)


def _on_cpu(answer: tuple[torch.Tensor, torch.Tensor]) -> tuple[Array, Array]:
    return answer[0].cpu().numpy(), answer[1].cpu().numpy()
