"""Foreign images are rejected: their deployed answers are zeros."""

import pytest
import torch
from test_train import QUIET, assert_same
from testing import seeded
from torch import nn
from torch.nn import functional as F
from trainings import train_interrupted

from divqat import convert, prepare, preset
from divqat._util.files import read_json
from divqat.data.batches import to_float
from divqat.data.proxies import proxy_batch, proxy_pools
from divqat.experiments.subjects import decoy_of, deploy_run
from divqat.metrics import accuracy, predict
from divqat.nn import MisdirectionLoss, RectifiedOutput
from divqat.nn.misdirection_targets import MisdirectionTargets
from divqat.quantize.rectify import output_bias, output_quantizer, unrectified
from divqat.train import TrainConfig, load_run, train
from divqat.train.budget import Budget
from divqat.train.distributed import World
from divqat.train.folder import load_splits
from divqat.train.proxies import Proxies
from divqat.victim import Victim

KINDS = ("glyphs", "noise", "shuffled")
COMMON = dict(dataset="digits", batch_size=64, lr=0.05, threads=1)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    train(TrainConfig(**COMMON, epochs=5), folder, **QUIET)
    return folder


@pytest.fixture(scope="module")
def qat(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "qat"
    train(TrainConfig(**COMMON, method="qat", teacher=str(teacher), epochs=2), folder, **QUIET)
    return folder


def settings(teacher, qat, **changes):
    own = dict(method="divqat", teacher=str(teacher), reference=str(qat), accuracy_budget=5.0)
    own |= dict(misdirect=0.5, misdirect_target="reject", proxies=KINDS, epochs=4, lr=0.02)
    return TrainConfig(**{**COMMON, **own, **changes})


@pytest.fixture(scope="module")
def rejecting(teacher, qat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejecting") / "divqat"
    train(settings(teacher, qat), folder, **QUIET)
    return folder


def targets():
    return MisdirectionTargets("reject", 4, (1, 8, 8), 0)


def test_the_loss_is_the_cross_entropy_with_a_class_whose_logit_is_0():
    logits = torch.randn(50, 4, dtype=torch.float64, generator=seeded()) * 5
    labels = torch.arange(50) % 4
    wider = torch.cat([logits, logits.new_zeros(50, 1)], dim=1)
    loss, misled = targets().terms(logits, None, torch.zeros(50, 1, 8, 8))
    wanted = F.cross_entropy(wider, torch.full((50,), 4), reduction="sum")
    torch.testing.assert_close(loss, wanted)
    assert misled == (logits < 0).all(1).sum() > 0
    accepted = F.cross_entropy(logits, labels) + targets().acceptance(logits)
    torch.testing.assert_close(accepted, F.cross_entropy(wider, labels), check_dtype=False)
    assert MisdirectionTargets("second", 4, (1, 8, 8), 0).acceptance(logits) == 0


def test_extreme_logits_have_finite_gradients():
    logits = torch.tensor([[1e4, -1e4], [-1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    loss, misled = targets().terms(logits, None, torch.zeros(3, 1, 8, 8))
    (loss + targets().acceptance(logits)).backward()
    assert logits.grad.isfinite().all() and misled == 2


def test_training_images_pay_for_not_being_accepted(teacher, qat):
    misdirection = MisdirectionLoss(
        [(torch.rand(64, 1, 8, 8, generator=seeded()) * 2 - 1, torch.arange(64) % 10)],
        10, seed=0, kinds=KINDS, target="reject",
    )  # fmt: skip
    assert misdirection.decoy is None and not misdirection.targets.needs_teacher
    rejected, accepted = torch.full((2, 10), -9.0), torch.full((2, 10), 9.0)
    assert misdirection.targets.acceptance(rejected) > 6
    assert misdirection.targets.acceptance(accepted) < 1e-4
    proxies = misdirection.draw(torch.rand(2, 1, 8, 8) * 2 - 1, share=1.0)
    assert misdirection(rejected, proxies) < 0.01 and misdirection.misled == 1


class Net(nn.Module):
    def __init__(self, last=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.last = nn.Linear(4, 3) if last is None else last

    def forward(self, x):
        return self.last(self.conv(x).relu().mean((2, 3)))


def prepared(preset_name="x86", bits=8):
    config = preset(preset_name, activation_bits=bits)
    config = type(config)(**{**vars(config), "rectify_output": True})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(Net(), config, torch.zeros(2, 1, 6, 6))


@pytest.mark.parametrize(("name", "bits"), [("x86", 8), ("x86", 4), ("tensorrt", 8)])
def test_logits_are_raw_in_training_and_rectified_on_their_grid_in_eval_mode(name, bits):
    model, images = prepared(name, bits), torch.randn(64, 1, 6, 6, generator=seeded())
    raw = [model(images) for _ in range(3)][-1]
    assert (raw < 0).any() and (raw > 0).any() and raw.requires_grad
    model.eval()
    with torch.no_grad():
        answers = model(images)
        with unrectified(model):
            logits = model(images)
    assert (logits < 0).any() and torch.equal(model(images), answers)
    quantizer = output_quantizer(model)
    scale, zero_point = quantizer.calculate_qparams()
    assert quantizer.spec.bits == bits and zero_point == 0
    high = quantizer.spec.quant_max * scale
    wanted = (logits.clamp(min=0) / scale).round().mul(scale).clamp(max=high)
    torch.testing.assert_close(answers, wanted)
    assert (answers[logits < 0] == 0).all()
    converted = convert(model)
    with torch.no_grad():
        torch.testing.assert_close(converted(images), answers)


def test_the_shift_of_the_bias_is_that_of_the_logits():
    model, images = prepared(), torch.randn(16, 1, 6, 6, generator=seeded())
    model(images)
    model.eval()
    step = float(convert(model).get_submodule("last").bias_scale.max())  # biases are integers
    with torch.no_grad(), unrectified(model):
        before = model(images)
        output_bias(model).sub_(0.25)
        torch.testing.assert_close(model(images), before - 0.25, atol=1.01 * step, rtol=0)
    assert output_bias(Net()) is None and output_quantizer(Net()) is None


def test_models_whose_logits_are_those_of_no_linear_layer_have_no_bias_to_shift():
    for net in (nn.Sequential(nn.Conv2d(1, 3, 6), nn.BatchNorm2d(3), nn.Flatten()), Net(Twice())):
        model, images = prepare(net, "x86", torch.zeros(2, 1, 6, 6)), torch.ones(2, 1, 6, 6)
        assert output_bias(model) is None
        model(images)
        model.eval()
        with torch.no_grad(), unrectified(model):  # it is not rectified in any case
            logits = model(images)
        assert all(map(torch.equal, pair(logits), pair(model(images))))


def pair(logits):
    return logits if isinstance(logits, tuple) else (logits,)


def test_refusals():
    config = type(preset("x86"))(rectify_output=True)
    with pytest.raises(ValueError, match="rectify_output: wanted a model that can be traced"):
        prepare(Net(), config)
    twice = nn.Sequential(nn.Linear(3, 3), Twice())
    with pytest.raises(ValueError, match="rectify_output: wanted a model that returns one tensor"):
        prepare(twice, config, torch.zeros(2, 3))


class Twice(nn.Module):
    def forward(self, x):
        return x, x


def test_the_threshold_is_the_largest_within_the_budget():
    logits = torch.tensor([[5.0, 0.0], [4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 0, 1])  # four right answers, of 2 and more

    def threshold(points, reference=0.8):
        return Budget(points, reference, {}).largest_threshold(logits, labels)

    assert threshold(0.1) == 2 and threshold(20) == 3 and threshold(40) == 4
    assert threshold(99) == 5  # no more than every right answer but one
    assert threshold(0.1, reference=1.0) is None
    for points in (0.1, 20, 40):
        answers = (logits - threshold(points) + 0.01).clamp(min=0)
        kept = (answers.amax(1) > 0) & (answers.argmax(1) == labels)
        assert kept.double().mean() >= 0.8 - points / 100 - 1e-9


def test_an_accuracy_budget_is_spent_on_rejecting(qat, rejecting):
    reference, run = read_json(qat / "summary.json"), load_run(rejecting)
    summary, splits = read_json(rejecting / "summary.json"), run.splits()
    budget = summary["budget"]
    assert budget["inside"] and budget["share"] == 1
    least = reference["validation_accuracy"] - 0.05
    assert summary["validation_accuracy"] >= least - 1e-9
    model, validation = run.model.eval(), splits.validation
    # One right answer less would be too few.
    with torch.no_grad():
        output_bias(model).sub_(2 * float(output_quantizer(model).calculate_qparams()[0]))
    answers = predict(model, validation)
    kept = (answers.amax(1) > 0) & (answers.argmax(1) == validation.labels)
    assert kept.double().mean() < least


def test_deployed_answers_to_foreign_images_are_all_the_same(rejecting, qat):
    run = load_run(rejecting)
    splits = run.splits()
    images = splits.test.images
    pools = proxy_pools(KINDS, images.shape[1:], images.device, seed=99)
    foreign = proxy_batch(KINDS, images, seeded(5), 400, pools=pools)
    subject = deploy_run(run, splits, name="rejecting")
    answers = Victim(subject.model)(to_float(foreign))
    uniform = (answers == 0.1).all(1)
    # Unlike an undefended network, which has no class for them.
    assert uniform.double().mean() > 0.5
    assert accuracy(predict(subject.gradients, splits.test), splits.test.labels) > 0.8
    decoy = decoy_of(run, splits)
    assert torch.equal(decoy(to_float(foreign)), torch.full((400, 10), 0.1))
    plain = predict(load_run(qat).model.eval(), foreign)
    assert (plain.amax(1) > 0).double().mean() > 0.9


def test_an_interrupted_run_ends_with_the_same_bits(teacher, qat, rejecting, tmp_path):
    train_interrupted(settings(teacher, qat), tmp_path, 2)
    assert_same(tmp_path, rejecting)


def test_the_output_quantizer_keeps_logits_out_of_saved_codes():
    model = prepared()
    model(torch.randn(8, 1, 6, 6))
    output = output_quantizer(model)
    assert isinstance(output, RectifiedOutput)
    assert output.calibrated and not output.quantizes()
    assert output.eval().quantizes()


def test_proxies_get_the_augmentation_of_the_training_images():
    """Otherwise its black edges would tell them apart."""
    train_set = load_splits(TrainConfig(dataset="digits")).train
    white = torch.full((50, 1, 8, 8), 255, dtype=torch.uint8)

    def drawn(epoch, **augmentation):
        proxies = Proxies(lambda *_: white, 0, World(), **augmentation)
        proxies.start(epoch)
        return proxies(to_float(train_set.images[:50]), train_set.labels[:50], 50)

    assert torch.equal(drawn(1), to_float(white))
    shifted = drawn(1, pad=2)
    rows = (shifted.amax((1, 3)) < 0).sum(1)  # black ones
    assert set(rows.tolist()) == {0, 1, 2} and torch.equal(shifted, drawn(1, pad=2))
    assert not torch.equal(shifted, drawn(2, pad=2))
