"""A model for other joints than it was trained on: all that does not depend on them stays, and joints of the same name.

It knows networks and names; not where the model comes from.
"""

from torch import Tensor

from pipeline.model.directory import ModelSpec
from pipeline.model.mspn import MSPN
from pipeline.pose.skeleton import Skeleton

HEAD = ".res_conv2."  # the convolution and batch norm whose channels are the joints


def with_joints(network: MSPN, spec: ModelSpec, skeleton: Skeleton) -> tuple[MSPN, ModelSpec, list[str]]:
    """A network for the skeleton's joints that begins as `network`, its spec, and the joints that are new to it.

    In every head a joint of the same name keeps its channel; a new one is drawn from torch's global generator, as an
    untrained network's is. The decoding, the colours and the crop stay the model's.
    """
    old = Skeleton.from_json(spec.skeleton).joints
    config = network.config.model_copy(update={"num_joints": skeleton.num_joints})
    other = MSPN(config)
    known = network.state_dict()
    other.load_state_dict({name: _adapted(known[name], drawn, old, skeleton.joints) if HEAD in name else known[name]
                           for name, drawn in other.state_dict().items()})
    new = [joint for joint in skeleton.joints if joint not in old]
    return other, spec.model_copy(update={"network": config, "skeleton": skeleton.to_json()}), new


def _adapted(known: Tensor, drawn: Tensor, old: tuple[str, ...], new: tuple[str, ...]) -> Tensor:
    """The drawn tensor [K, ...] with the known values of the joints that were there; a scalar is the known one."""
    if not known.ndim:
        return known
    adapted = drawn.clone()
    for index, joint in enumerate(new):
        if joint in old:
            adapted[index] = known[old.index(joint)]
    return adapted
