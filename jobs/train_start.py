"""What a rank begins with: the network as the settings want it, its optimiser, and the last checkpoint's state."""

import io
import logging
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.train_checkpoints import restore
from jobs.train_intent import default_inference
from jobs.train_task import INIT_FOLDER, TrainTask, Worker, gather
from pipeline import storage, training
from pipeline.averaging import WeightAverage
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.model.architectures import NETWORKS, config_of, make_network
from pipeline.model.compiling import compile_forward, why_not_compile
from pipeline.model.directory import NORMALISATIONS, ModelSpec, load_model, model_digest, spec_of_use
from pipeline.model.joint_sets import with_joints
from pipeline.model.network import NetworkConfig, PoseNetwork
from pipeline.model.recompute import recompute_activations
from pipeline.model.settings import InferenceConfig
from pipeline.model.sync_batch_norm import synchronise_batch_norms
from pipeline.model_reference import download_model, find_model
from pipeline.pose.skeleton import Skeleton

logger = logging.getLogger("jobs.train")
GIVE_CLASSIFIER = "Give a ResNet-50's state dict with torchvision's names; for hrnet, the HRNet classifier's."


def open_worker(task: TrainTask, rank: int, world: int) -> Worker:
    """The rank as it was at the last checkpoint, or before its first iteration. All ranks open together.

    ConfigError and DataError are the same on every rank: settings that don't fit, checkpoints that can't be read.
    """
    import ray.train.torch

    device = ray.train.torch.get_device()
    network, spec = new_network(task)
    # half as fast again on CPUs
    network = network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = training.make_optimiser(network, weight_decay=task.config.optimiser.weight_decay)
    decay = task.config.optimiser.ema_decay
    average = None if decay is None else WeightAverage(network, decay=decay)
    state = (restore(task, network, optimiser, average, rank=rank, world=world)
             or training.TrainingState(0, ((0,) * len(task.sets),) * world))
    if task.config.sync_batch_norm and world > 1:
        synchronise_batch_norms(network)
    if task.config.checkpoint_activations:
        recompute_activations(network)
    wrapped = network if world == 1 else averaging(network)
    worker = Worker(task, rank, world, device, spec, network, wrapped, optimiser, state.iteration,
                    training.positions_of(state, rank=rank, world=world), average)
    if task.config.compile is not None:
        _refuse_uncompilable(worker)
        compile_forward(wrapped, task.config.compile)
    return worker


def _refuse_uncompilable(worker: Worker) -> None:
    """The same refusal on all ranks, on whichever machine something is missing: none may wait for one that gave up."""
    problems = gather(worker, (why := why_not_compile()) and f"{socket.gethostname()}: {why}")
    for problem in filter(None, problems):
        raise ConfigError(f"compile={worker.task.config.compile} needs a compiler on each worker's machine. {problem}; "
                          "or leave compile out, in a new --output.")


def averaging(network: PoseNetwork) -> torch.nn.Module:
    """The network in a wrapper that averages gradients over the ranks, adding them up alike after every restart.

    The wrapper lays its buckets out anew after the first backward pass, in the order in which gradients came. From
    three ranks on, a sum's rounding depends on where in a bucket a gradient lies, so that a run that goes on, whose
    first pass is another one, would leave the unbroken one's way. A rehearsal comes before either's first iteration.
    """
    # as the authors: each rank keeps its own batch norm statistics, and rank 0's are saved
    wrapped = torch.nn.parallel.DistributedDataParallel(network, forward_sync_buffers=False)
    buffers = [buffer.clone() for buffer in network.buffers()]
    width, height = network.config.input_size_wh
    images = torch.zeros((2, 3, height, width), device=next(network.parameters()).device)
    sum(heatmaps.sum() for stage in wrapped(images) for heatmaps in stage).backward()
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return wrapped


def new_network(task: TrainTask) -> tuple[PoseNetwork, ModelSpec]:
    """The network before its first iteration, the same on every rank, and the specification of what it becomes."""
    with tempfile.TemporaryDirectory() as folder:
        own_copy = storage.join(task.config.output, INIT_FOLDER)
        init = None if task.config.init is None else download_model(own_copy, Path(folder))
        return _network_of(task.config, task.skeleton, init)


@dataclass(frozen=True)
class InitialModel:
    """The model that `init` means now. `intent`: which it is, and what the settings leave to it."""

    directory: Path
    intent: dict[str, Any]


def try_start(config: TrainConfig, skeleton: Skeleton, into: Path) -> InitialModel | None:
    """The model of `init`, if one is given, found below `into`.

    Refuses (ConfigError, DataError), before anything is frozen, what each worker would refuse: a network that can't
    be, a trunk or a model that is none, or that doesn't fit the settings.
    """
    if config.init is None:
        with torch.device("meta"):  # names and shapes alone: no memory for the weights of a large network
            _network_of(config, skeleton, None)
        return None
    if config.trunk is not None:
        raise ConfigError("init and trunk are both given, but a network begins from one of them. Leave one out "
                          "(--set trunk=null).")
    if config.heatmap_scale != 1:
        logger.info("heatmap_scale=%g has no effect: it is for an untrained network, and this one begins from init",
                    config.heatmap_scale)
    model = find_model(config.init, settings=config.tracking, into=into, asked_by="init")
    _, spec = _network_of(config, skeleton, model.directory)
    return InitialModel(model.directory, {
        "init_reference": model.reference, "init_digest": model_digest(model.directory), "heatmap_scale": 1.0,
        "network": spec.network.model_dump(mode="json", exclude={"num_joints"}),
        "loss": spec.loss.model_dump(mode="json"), "inference": inference_of(spec).model_dump(mode="json")})


def _network_of(config: TrainConfig, skeleton: Skeleton, init: Path | None) -> tuple[PoseNetwork, ModelSpec]:
    torch.manual_seed(config.seed)
    asked = config_of(config.network, num_joints=skeleton.num_joints)
    if init is not None:
        return _initial_model(config, skeleton, asked, init)
    network = make_network(asked)
    training.scale_heatmaps(network, config.heatmap_scale)
    if config.trunk is not None:
        load_trunk = NETWORKS[asked.architecture].load_trunk
        if load_trunk is None:
            raise ConfigError(f"trunk: there is no classifier from whose weights {asked.architecture} could begin. "
                              "Leave it out, or begin from a model (init).")
        load_trunk(network, _trunk_weights(config.trunk), colour=config.inference.colour)
    return network, spec_of_use(asked, skeleton, config.inference, config.loss)


def _trunk_weights(uri: str) -> dict[str, torch.Tensor]:
    try:
        weights = torch.load(io.BytesIO(storage.read_object(uri)), map_location="cpu", weights_only=True)
    except storage.StorageError:
        raise
    except Exception as error:  # on bytes that aren't weights, unpickling raises whatever it likes
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"trunk {uri} holds something else than weights, and nothing of it was run: {first_line} "
                        f"{GIVE_CLASSIFIER}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise DataError(f"trunk {uri} is no state dict. {GIVE_CLASSIFIER}")
    return weights


def _initial_model(config: TrainConfig, skeleton: Skeleton, asked: NetworkConfig,
                   directory: Path) -> tuple[PoseNetwork, ModelSpec]:
    """The model of `init`, whose architecture, crop and decoding are taken unless the settings give others.

    Heads for other joints are new.
    """
    network, spec = load_model(directory)
    own = network.config.model_copy(update={"num_joints": asked.num_joints})
    if "network" in config.model_fields_set and own != asked:
        raise ConfigError(f"init {config.init} is {own}, but `network` asks for {asked}. Leave `network` out, or "
                          "begin from another model.")
    _refuse_other_inference(config, spec)
    if "loss" in config.model_fields_set:
        spec = ModelSpec.model_validate(spec.model_copy(update={"loss": config.loss}))
    if tuple(spec.skeleton["joints"]) == skeleton.joints:
        return network, spec
    network, spec, new = with_joints(network, spec, skeleton)
    logger.info("init %s has other joints: %s", config.init,
                f"those that are new begin untrained: {', '.join(new)}" if new else "none is new")
    return network, spec


def inference_of(spec: ModelSpec) -> InferenceConfig:
    """The settings by which `spec_of_use` makes a model be used so."""
    normalisation = "none" if spec.mean == NORMALISATIONS["none"][0] else "imagenet"
    return InferenceConfig(colour=spec.colour, normalisation=normalisation, box_padding_wh=spec.box_padding_wh,
                           decoding=spec.decoding.variant, blur_kernel=spec.decoding.blur_kernel)


def _refuse_other_inference(config: TrainConfig, spec: ModelSpec) -> None:
    """Weights are right only with what they were trained with: settings that aren't the defaults must be just that."""
    own = inference_of(spec)
    if config.inference not in (default_inference(config), own):
        raise ConfigError(f"init {config.init}: it was trained with inference {own.model_dump(mode='json')}, but asked "
                          f"for is {config.inference.model_dump(mode='json')}. Give the model's own, or begin from "
                          "another one.")
