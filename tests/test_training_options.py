"""What a step can do besides the authors' plain one: each option against the plain step, or against hand arithmetic."""

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs import train_intent
from pipeline import training
from pipeline.averaging import WeightAverage
from pipeline.config import TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.model.compiling import compile_forward, why_not_compile
from pipeline.model.directory import ModelSpec, load_model, normalise_crops, save_model
from pipeline.model.loss import mspn_loss
from pipeline.model.mspn import MSPN
from pipeline.model.recompute import recompute_activations
from pipeline.model.sync_batch_norm import synchronise_batch_norms
from pipeline.model.targets import draw_targets
from pipeline.pose.skeleton import COCO17
from tests import gloo_ranks
from tests.worlds import TINY

SPEC = ModelSpec(network=TINY, skeleton=COCO17.to_json())
pytestmark = pytest.mark.usefixtures("one_thread")


# --- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_a_batch_in_pieces_gives_the_whole_batchs_update_where_batch_norms_are_fixed(pieces: int) -> None:
    whole, in_pieces = new_network().eval(), new_network().eval()
    expected, found = sgd_step(whole, random_batch()), sgd_step(in_pieces, random_batch(), accumulate=pieces)

    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    torch.testing.assert_close(found.heads, expected.heads, rtol=1e-5, atol=0)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(in_pieces)[name], gradient, rtol=0, atol=1e-5 * float(gradient.norm()))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(in_pieces.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_batch_norms_see_the_pieces() -> None:
    in_pieces, by_hand = new_network(), new_network()
    batch = random_batch()
    sgd_step(in_pieces, batch, rate=0.0, accumulate=2)
    with torch.no_grad():
        for half in batch.crops.chunk(2):
            by_hand(normalise_crops(half, SPEC).to(memory_format=torch.channels_last))
    assert int(in_pieces.top.conv.bn.num_batches_tracked) == 2
    assert_same_bits(dict(in_pieces.named_buffers()), dict(by_hand.named_buffers()))


def test_only_the_last_piece_lets_ranks_meet() -> None:
    class Recorder(MSPN):
        apart = 0
        passes: tuple[int, ...] = ()

        def no_sync(self) -> Any:
            self.apart += 1
            return torch.enable_grad()

        def forward(self, images: Tensor) -> Any:
            self.passes = (*self.passes, self.apart)
            return super().forward(images)

    network = Recorder(TINY)
    sgd_step(network, random_batch(), accumulate=3)
    assert (network.apart, network.passes) == (2, (1, 2, 2))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimiser.accumulate.*batch_size_per_worker, 32, must be a multiple"):
        load_config(TrainConfig, flags={"data": "d", "output": "o"}, assignments=["optimiser.accumulate=5"])


# --- clipping -----------------------------------------------------------------------------------------------------


def test_long_gradients_are_shortened_to_the_norm_and_keep_their_direction() -> None:
    plain, clipped = new_network(), new_network()
    sgd_step(plain, random_batch())
    length = norm(gradients(plain))
    report = sgd_step(clipped, random_batch(), clip_norm=length / 4)

    assert float(report.gradient_norm) == pytest.approx(length, rel=1e-5)
    assert norm(gradients(clipped)) == pytest.approx(length / 4, rel=1e-5)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(clipped)[name], gradient / 4, rtol=1e-4, atol=1e-6 * length)


def test_shorter_gradients_are_left_alone() -> None:
    plain, clipped = new_network(), new_network()
    report = sgd_step(plain, random_batch())
    assert float(report.gradient_norm) == pytest.approx(norm(gradients(plain)), rel=1e-6)
    sgd_step(clipped, random_batch(), clip_norm=norm(gradients(plain)) * 1.01)
    assert_same_bits(gradients(clipped), gradients(plain))
    assert_same_bits(clipped.state_dict(), plain.state_dict())


# --- bfloat16 -----------------------------------------------------------------------------------------------------


def test_in_bfloat16_heatmaps_and_gradients_are_rounded_and_near_those_of_float32() -> None:
    exact, rounded = new_network().eval(), new_network().eval()  # a batch's own statistics would magnify the rounding
    seen = {network: heatmaps_of(network) for network in (exact, rounded)}
    expected, found = sgd_step(exact, random_batch()), sgd_step(rounded, random_batch(), bfloat16=True)

    # each layer rounds by 2**-9 of a value at most
    for head, wanted in zip(seen[rounded], seen[exact], strict=True):
        assert (head.dtype, wanted.dtype) == (torch.bfloat16, torch.float32)
        assert 0 < float((head.float() - wanted).norm() / wanted.norm()) < 0.02
    both = torch.stack([flat(gradients(network)) for network in (rounded, exact)])
    assert 0 < float((both[0] - both[1]).norm() / both[1].norm()) < 0.05
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-3)


def test_in_bfloat16_loss_targets_gradients_and_weights_are_float32() -> None:
    class Dark(MSPN):
        """Heatmaps of nothing, which are the same number in either precision."""

        def forward(self, images: Tensor) -> list[list[Tensor]]:
            dark = sum(weight.sum() for weight in self.parameters()) * 0
            return [[dark.expand(len(images), 17, 16, 16).bfloat16()] * 4]

    network, batch = Dark(TINY), random_batch()
    exact, rounded = sgd_step(network, batch), sgd_step(network, batch, bfloat16=True)
    assert rounded.heads.dtype == torch.float32
    assert torch.equal(rounded.heads, exact.heads)
    assert {each.dtype for each in (*network.parameters(), *gradients(network).values())} == {torch.float32}

    targets = draw_targets(batch.joints_xy, batch.visible, (64, 64))
    heatmaps = [[torch.zeros(6, 17, 16, 16)] * 4]
    assert torch.equal(mspn_loss(heatmaps, targets, batch.visible).heads.detach(), rounded.heads)
    assert not torch.equal(mspn_loss(heatmaps, targets.bfloat16(), batch.visible).heads, rounded.heads)


# --- the average of the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "averages"), [
    # (1 + n) / (10 + n) is 1/10, 2/11, 1/4: 0.1 * 0 + 0.9 * 10, (2 * 9 + 9 * 20) / 11, 0.25 * 18 + 0.75 * 30
    (0.9998, (9.0, 18.0, 27.0)),
    (0.2, (9.0, 18.0, 27.6)),  # the third time 0.2 is less than 1/4
    (0.05, (9.5, 19.475, 29.47375))])
def test_the_average_is_that_of_hand_arithmetic(decay: float, averages: tuple[float, ...]) -> None:
    network = MSPN(TINY)
    fill(network, 0.0)
    average = WeightAverage(network, decay=decay)
    for value, expected in zip((10.0, 20.0, 30.0), averages, strict=True):
        fill(network, value)
        average.update(network)
        for name, tensor in average.network.state_dict().items():
            wanted = expected if tensor.is_floating_point() else value  # counters are copied
            torch.testing.assert_close(tensor, torch.full_like(tensor, wanted), rtol=1e-6, atol=0, msg=name)
    assert all((tensor == 30).all() for tensor in network.state_dict().values())


def test_the_average_is_for_answers_and_the_raw_network_goes_on_learning() -> None:
    network = new_network()
    average = WeightAverage(network, decay=0.9)
    assert network.training
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_two_steps_and_two_more_after_a_restart_are_four_with_their_average_bit_for_bit() -> None:
    unbroken, first, second = AveragedRun(), AveragedRun(), AveragedRun(seed=99)
    unbroken.train(4)
    first.train(2)
    second.load(first.state())
    second.train(2)
    assert_same_bits(second.network.state_dict(), unbroken.network.state_dict())
    assert_same_bits(second.average.network.state_dict(), unbroken.average.network.state_dict())
    assert second.average.updates == 4
    assert not torch.equal(unbroken.average.network.top.conv.conv.weight, unbroken.network.top.conv.conv.weight)


def test_a_state_of_version_1_loads_and_an_average_begins_at_its_weights() -> None:
    before, after = AveragedRun(), AveragedRun(seed=99)
    before.train(1)
    sink = io.BytesIO()
    torch.save({"version": 1, "iteration": 1, "positions": [6, 7], "network": before.network.state_dict(),
                "optimiser": before.optimiser.state_dict(), "random": torch.get_rng_state()}, sink)

    state = after.load(sink.getvalue())

    assert state == training.TrainingState(1, ((6,), (7,)))
    assert after.average.updates == 0
    assert_same_bits(after.network.state_dict(), before.network.state_dict())
    assert_same_bits(after.average.network.state_dict(), before.network.state_dict())


# --- batch norms over all workers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes with synchronised batch norms had."""
    return gloo_ranks.synchronised_ranks(tmp_path_factory.mktemp("ranks"))


def test_two_processes_with_synchronised_batch_norms_are_one_with_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    whole = gloo_ranks.one_pass(gloo_ranks.new_network(), gloo_ranks.whole_batch())

    heatmaps = torch.cat([rank["plain"]["heatmaps"] for rank in ranks], dim=1)
    torch.testing.assert_close(heatmaps, whole["heatmaps"], rtol=1e-9, atol=1e-9)
    for rank in ranks:
        assert rank["plain"]["state"].keys() == whole["state"].keys()
        for name, tensor in whole["state"].items():
            torch.testing.assert_close(rank["plain"]["state"][name], tensor, rtol=1e-9, atol=1e-12, msg=name)
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(rank["plain"]["gradients"][name], gradient, rtol=1e-7, atol=1e-9, msg=name)
        for kind in ("gradients", "state"):
            assert_same_bits(rank["recomputed"][kind], rank["plain"][kind])


def test_synchronised_batch_norms_take_bfloat16_and_reckon_in_float32(ranks: list[dict[str, Any]]) -> None:
    expected = gloo_ranks.norm_of(gloo_ranks.whole_batch()[0].float(), torch.nn.BatchNorm2d(3))
    for each, wanted in zip(zip(*(rank["bfloat16"] for rank in ranks), strict=True), expected, strict=True):
        found = torch.cat(each)
        assert found.dtype == torch.bfloat16
        # bfloat16 has 8 bits: steps of 1/128 of a value between 1 and 2
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


# --- recomputation ------------------------------------------------------------------------------------------------


def test_recomputed_activations_change_no_bit_of_outputs_gradients_and_statistics() -> None:
    plain, recomputed = new_network(), new_network()
    recompute_activations(recomputed)
    calls = count_calls(recomputed.stages[0].downsample.layer1[0].conv_bn_relu1)
    for _ in range(2):
        expected, found = sgd_step(plain, random_batch()), sgd_step(recomputed, random_batch())
        assert torch.equal(found.heads, expected.heads)
        assert_same_bits(gradients(recomputed), gradients(plain))
        assert_same_bits(recomputed.state_dict(), plain.state_dict())
    assert len(calls) == 4  # once forward and once backward, twice


def test_a_copy_of_a_recomputing_network_is_a_network_of_its_own() -> None:
    network = new_network()
    recompute_activations(network)
    copied = copy.deepcopy(network).eval()
    images = torch.randn(1, 3, 64, 64)
    before = copied.predict(images)
    fill(network, 0.0)
    torch.testing.assert_close(copied.predict(images), before, rtol=0, atol=0)


# --- compilation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the compiler takes minutes where other work goes on
@pytest.mark.skipif(why_not_compile() is not None, reason="needs what torch.compile needs")
def test_a_compiled_forward_trains_as_the_plain_one_to_rounding() -> None:
    plain, compiled = new_network(), new_network()
    compile_forward(compiled, "default")
    for _ in range(2):
        expected, found = sgd_step(plain, random_batch()), sgd_step(compiled, random_batch())
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(compiled.get_buffer(name), buffer, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the compiler takes minutes where other work goes on
@pytest.mark.skipif(why_not_compile() is not None, reason="needs what torch.compile needs")
def test_two_processes_with_a_compiled_forward_step_as_two_without(tmp_path: Path) -> None:
    first, second = gloo_ranks.compiled_ranks(tmp_path)
    weights = [name for name, _ in gloo_ranks.new_network().named_parameters()]
    assert_same_bits({name: first["compiled"][name] for name in weights},
                     {name: second["compiled"][name] for name in weights})
    for name, tensor in first["plain"].items():
        torch.testing.assert_close(first["compiled"][name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_a_machine_without_a_compiler_says_so_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    problem = why_not_compile()
    assert problem is not None
    assert "install g++" in problem


@pytest.mark.parametrize("other", ["sync_batch_norm", "checkpoint_activations"])
def test_compile_is_refused_with_what_it_can_not_see_through(other: str) -> None:
    with pytest.raises(ConfigError, match=f"{other}: .*leave {other} or compile out"):
        load_config(TrainConfig, flags={"data": "d", "output": "o", "compile": "default", other: True})


# --- what remains of it -------------------------------------------------------------------------------------------


def test_weights_have_their_plain_names_whatever_the_network_was_trained_with(tmp_path: Path) -> None:
    network, plain = new_network(), new_network()
    synchronise_batch_norms(network)
    recompute_activations(network)
    compile_forward(network, "default")
    save_model(tmp_path / "model", network, SPEC)
    loaded, _ = load_model(tmp_path / "model")
    assert_same_bits(loaded.state_dict(), plain.state_dict())


def test_a_run_that_was_begun_before_an_option_existed_goes_on_with_its_default_alone() -> None:
    begun = {"optimiser": {"iterations": 96000}, "seed": 0, "joints": ["nose"]}
    defaults = {"optimiser": {"iterations": 96000, "accumulate": 1}, "seed": 0, "compile": None}
    now = {"optimiser": {"iterations": 96000, "accumulate": 1}, "seed": 0, "compile": None, "joints": ["nose"]}
    assert train_intent._as_it_began(now, begun, defaults) == begun
    other = now | {"optimiser": {"iterations": 96000, "accumulate": 4}}
    assert train_intent._as_it_began(other, begun, defaults) == begun | {"optimiser": other["optimiser"]}
    assert train_intent._as_it_began(now | {"seed": 1}, begun, defaults) == begun | {"seed": 1}


def test_recomputing_activations_changes_no_bit_and_so_is_no_intent() -> None:
    assert "checkpoint_activations" not in intent_of("checkpoint_activations=true")


# --- small worlds -------------------------------------------------------------------------------------------------


def new_network() -> MSPN:
    torch.manual_seed(0)
    return MSPN(TINY).train()


def random_batch() -> training.TrainingBatch:
    chance = torch.Generator().manual_seed(1)
    return training.TrainingBatch(
        torch.randint(0, 256, (6, 64, 64, 3), generator=chance, dtype=torch.uint8),
        torch.rand((6, 17, 2), generator=chance) * 63,
        torch.randint(0, 3, (6, 17), generator=chance, dtype=torch.uint8), torch.arange(6))


def sgd_step(network: MSPN, batch: training.TrainingBatch, rate: float = 1e-6,
             **options: Any) -> training.StepReport:
    """A step whose update is the gradients themselves, times the rate; they stay with the parameters."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.0)
    return training.train_step(network, optimiser, batch, iteration=1, rate=rate, spec=SPEC, **options)


def gradients(network: MSPN) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


def heatmaps_of(network: MSPN) -> list[Tensor]:
    """The heatmaps of each head, once the network has been called."""
    seen: list[Tensor] = []
    network.register_forward_hook(lambda *given: seen.extend(head.detach() for stage in given[2] for head in stage))
    return seen


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.ravel() for tensor in tensors.values()])


def norm(tensors: dict[str, Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors.values()) ** 0.5)


def fill(network: MSPN, value: float) -> None:
    for tensor in network.state_dict().values():
        tensor.fill_(value)


def count_calls(module: torch.nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def intent_of(*assignments: str) -> dict[str, Any]:
    config = load_config(TrainConfig, flags={"data": "d", "output": "o", "workers": 2}, assignments=assignments)
    first = SimpleNamespace(dataset=SimpleNamespace(skeleton=None))
    return train_intent.resolved_intent(config, None, [first])  # type: ignore[list-item]


class AveragedRun:
    """Training with an average, on the same batch again and again."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = MSPN(TINY).train()
        self.optimiser = training.make_optimiser(self.network, weight_decay=1e-5)
        self.average = WeightAverage(self.network, decay=0.9)

    def train(self, iterations: int) -> None:
        for _ in range(iterations):
            training.train_step(self.network, self.optimiser, random_batch(), iteration=1, rate=1e-3, spec=SPEC,
                                clip_norm=10.0, accumulate=2)
            self.average.update(self.network)

    def state(self) -> bytes:
        return training.state_bytes(self.network, self.optimiser, training.TrainingState(2, ((12,),)), self.average)

    def load(self, data: bytes) -> training.TrainingState:
        return training.load_state(data, self.network, self.optimiser, self.average)
