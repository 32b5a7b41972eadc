"""What a rank begins with: the network as the settings want it, its optimiser, and the last checkpoint's state."""

import io
import logging
import tempfile
from pathlib import Path

import torch

from jobs.train_task import INIT_FOLDER, STATE_FILE, TrainTask, Worker
from pipeline import storage, training
from pipeline.config import InferenceConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.model.decode import Decoding
from pipeline.model.directory import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, ModelSpec, load_model
from pipeline.model.mspn import MSPN, MSPNConfig, load_trunk
from pipeline.model_reference import download_model
from pipeline.pose.skeleton import Skeleton

logger = logging.getLogger("jobs.train")


def open_worker(task: TrainTask, rank: int, world: int) -> Worker:
    import ray.train.torch

    device = ray.train.torch.get_device()
    network, spec = new_network(task)
    # half as fast again on CPUs
    network = network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = training.make_optimiser(network, weight_decay=task.config.optimiser.weight_decay)
    state = _restore(network, optimiser) or training.TrainingState(0, (0,) * world)
    if rank == 0 and state.iteration:
        logger.info("going on after iteration %d", state.iteration)
    # as the authors: each rank keeps its own batch norm statistics, and rank 0's are saved
    wrapped = network if world == 1 else torch.nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)
    return Worker(task, rank, world, device, spec, network, wrapped, optimiser, state.iteration,
                  training.position_of(state, rank=rank, world=world))


def new_network(task: TrainTask) -> tuple[MSPN, ModelSpec]:
    """The network before its first iteration, the same on every rank, and the specification of what it becomes."""
    config, skeleton = task.config, task.data.skeleton
    assert skeleton is not None
    torch.manual_seed(config.seed)
    asked = MSPNConfig(num_joints=skeleton.num_joints, **config.network.model_dump())
    if config.init is not None:
        return _initial_model(task, asked)
    network = MSPN(asked)
    training.scale_heatmaps(network, config.heatmap_scale)
    if config.trunk is not None:
        weights = torch.load(io.BytesIO(storage.read_object(config.trunk)), map_location="cpu", weights_only=True)
        load_trunk(network, weights, colour=config.inference.colour)
    return network, spec_of(config, asked, skeleton)


def spec_of(config: TrainConfig, network: MSPNConfig, skeleton: Skeleton) -> ModelSpec:
    """What model.json will say of a model that begins untrained: how it sees a person, and is decoded, is settings."""
    inference = config.inference
    mean, std = IMAGENET_MEAN_RGB, IMAGENET_STD_RGB
    if inference.colour == "BGR":
        mean, std = mean[::-1], std[::-1]
    return ModelSpec(network=network, skeleton=skeleton.to_json(), colour=inference.colour, mean=mean, std=std,
                     box_padding_wh=inference.box_padding_wh,
                     decoding=Decoding(variant=inference.decoding, blur_kernel=inference.blur_kernel))


def _initial_model(task: TrainTask, asked: MSPNConfig) -> tuple[MSPN, ModelSpec]:
    """The model of `init`, whose architecture, crop and decoding are taken unless the settings give others."""
    assert task.data.skeleton is not None
    with tempfile.TemporaryDirectory() as folder:
        network, spec = load_model(download_model(storage.join(task.config.output, INIT_FOLDER), Path(folder)))
    other = "network" in task.config.model_fields_set and network.config != asked
    if other or tuple(spec.skeleton["joints"]) != task.data.skeleton.joints:
        raise ConfigError(f"init {task.config.init}: it is {network.config} for the joints of {spec.skeleton['name']}, "
                          f"but asked for is {asked} for those of {task.data.skeleton.name}. Leave `network` out, or "
                          "begin from another model.")
    _refuse_other_inference(task.config, spec)
    return network, spec


def _refuse_other_inference(config: TrainConfig, spec: ModelSpec) -> None:
    """Weights are right only with what they were trained with: settings that aren't the defaults must be just that."""
    own = InferenceConfig(colour=spec.colour, box_padding_wh=spec.box_padding_wh, decoding=spec.decoding.variant,
                          blur_kernel=spec.decoding.blur_kernel)
    if config.inference not in (InferenceConfig(), own):
        raise ConfigError(f"init {config.init}: it was trained with inference {own.model_dump(mode='json')}, but asked "
                          f"for is {config.inference.model_dump(mode='json')}. Give the model's own, or begin from "
                          "another one.")


def _restore(network: MSPN, optimiser: torch.optim.Optimizer) -> training.TrainingState | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return training.load_state(Path(folder, STATE_FILE).read_bytes(), network, optimiser)
