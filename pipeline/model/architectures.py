"""Which networks there are: for each its file, a line here, and one in `settings.ARCHITECTURES`. No more knows them."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.model import hrnet, mspn
from pipeline.model.hourglass import HourglassConfig, StackedHourglass
from pipeline.model.hrnet import HRNet, HRNetConfig
from pipeline.model.mspn import MSPN, MSPNConfig
from pipeline.model.network import NetworkConfig, PoseNetwork
from pipeline.model.rsn import RSN, RSNConfig
from pipeline.model.settings import NetworkSettings


@dataclass(frozen=True)
class Built:
    """The classes of an architecture, and how an ImageNet classifier's weights get into it, where there is a way.

    load_trunk  (network, state dict, colour=order of the network's input channels)
    """

    config: type[NetworkConfig]
    network: type[PoseNetwork]
    load_trunk: Callable[..., None] | None = None


NETWORKS = {
    "mspn": Built(MSPNConfig, MSPN, mspn.load_trunk),
    "rsn": Built(RSNConfig, RSN),
    "hrnet": Built(HRNetConfig, HRNet, hrnet.load_trunk),
    "hourglass": Built(HourglassConfig, StackedHourglass),
}


def config_of(settings: NetworkSettings, *, num_joints: int) -> NetworkConfig:
    """The settings with their joints."""
    return NETWORKS[settings.architecture].config(num_joints=num_joints, **settings.model_dump())


def make_network(config: NetworkConfig) -> PoseNetwork:
    """The network that a config describes, freshly initialised as its authors do."""
    return NETWORKS[config.architecture].network(config)
