"""A model for other joints than it was trained on: all that does not depend on them stays, and joints of the same name.

It knows networks and names; not where the model comes from.
"""

import torch
from torch import Tensor

from pipeline.model.architectures import make_network
from pipeline.model.directory import ModelSpec
from pipeline.model.network import NetworkConfig, PoseNetwork
from pipeline.pose.skeleton import Skeleton


def with_joints(network: PoseNetwork, spec: ModelSpec, skeleton: Skeleton) -> tuple[PoseNetwork, ModelSpec, list[str]]:
    """A network for the skeleton's joints that begins as `network`, its spec, and the joints that are new to it.

    In every head a joint of the same name keeps its channel; a new one is drawn from torch's global generator, as an
    untrained network's is. The decoding, the colours and the crop stay the model's.
    """
    old = Skeleton.from_json(spec.skeleton).joints
    config = network.config.model_copy(update={"num_joints": skeleton.num_joints})
    other, channels = make_network(config), joint_channels(config)
    known = network.state_dict()
    adapted = {name: _adapted(known[name], drawn, channels[name], old, skeleton.joints)
               for name, drawn in other.state_dict().items() if name in channels}
    other.load_state_dict(known | adapted)
    new = [joint for joint in skeleton.joints if joint not in old]
    return other, spec.model_copy(update={"network": config, "skeleton": skeleton.to_json()}), new


def joint_channels(config: NetworkConfig) -> dict[str, int]:
    """The weights whose size follows the joints, each with the dimension that does: what another joint would change."""
    with torch.device("meta"):
        own, more = (make_network(config.model_copy(update={"num_joints": count})).state_dict()
                     for count in (config.num_joints, config.num_joints + 1))
    return {name: next(index for index, size in enumerate(tensor.shape) if size != more[name].shape[index])
            for name, tensor in own.items() if tensor.shape != more[name].shape}


def _adapted(known: Tensor, drawn: Tensor, dimension: int, old: tuple[str, ...], new: tuple[str, ...]) -> Tensor:
    """The drawn tensor with the known values of the joints that were there, along the dimension that is the joints."""
    adapted = drawn.clone()
    for index, joint in enumerate(new):
        if joint in old:
            adapted.select(dimension, index).copy_(known.select(dimension, old.index(joint)))
    return adapted
