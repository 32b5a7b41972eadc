"""A model that begins from one with other joints."""

import torch

from pipeline.model.directory import ModelSpec
from pipeline.model.joint_sets import with_joints
from pipeline.model.mspn import MSPN
from pipeline.pose.skeleton import COCO17, Skeleton
from tests.worlds import TINY

SPEC = ModelSpec(network=TINY, skeleton=COCO17.to_json(), box_padding_wh=(1.2, 1.3))
THREE = Skeleton("three", ("head_top", "left_knee", "nose"), (), (), (0.1, 0.1, 0.1), (0, 2))


def known() -> MSPN:
    """A network whose weights and statistics are all different numbers."""
    torch.manual_seed(0)
    network = MSPN(TINY)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return network.eval()


def test_joints_of_the_same_name_keep_their_heatmaps() -> None:
    network, images = known(), torch.randn(2, 3, 64, 64)
    other, spec, new = with_joints(network, SPEC, THREE)
    assert new == ["head_top"]
    for before, after in zip(network(images)[0], other.eval()(images)[0], strict=True):
        assert after.shape[1] == 3
        torch.testing.assert_close(after[:, 1], before[:, COCO17.joints.index("left_knee")])
        torch.testing.assert_close(after[:, 2], before[:, COCO17.joints.index("nose")])
    assert spec.skeleton["joints"] == ["head_top", "left_knee", "nose"]
    assert spec.network.num_joints == 3
    assert spec.box_padding_wh == (1.2, 1.3)


def test_a_new_joint_begins_as_in_an_untrained_network() -> None:
    other, _, _ = with_joints(known(), SPEC, THREE)
    head = other.stages[0].upsample.up4.res_conv2
    assert head.bn.weight[0] == 1
    assert head.bn.running_mean[0] == 0
    assert head.bn.running_var[0] == 1
    assert (head.bn.weight[1:] != 1).all()


def test_there_and_back_again_is_the_same_network() -> None:
    network = known()
    swapped = Skeleton("swapped", COCO17.joints[::-1], (), (), COCO17.sigmas[::-1], ())
    other, spec, new = with_joints(network, SPEC, swapped)
    again, _, _ = with_joints(other, spec, COCO17)
    assert not new
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
