"""InI: a training against a simulated thief."""

import copy

import pytest
import torch
from captured import host_reads, replay_steps, tape
from test_train import QUIET, assert_equal, assert_same
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from trainings import train_interrupted

from divqat import models
from divqat._util.files import load_checkpoint, read_json
from divqat._util.settings import ConfigError
from divqat.data import to_float
from divqat.experiments.deploy import export_run, verify_run
from divqat.nn.ini import InI, without_conflicts
from divqat.nn.proxies import ProxySource
from divqat.train import TrainConfig, load_run, step, train
from divqat.train.distributed import World
from divqat.train.network import build_model
from divqat.train.objective import Objective, build_thief
from divqat.train.proxies import Proxies
from divqat.train.step import Step

SETTINGS = dict(dataset="digits", model="lenet", batch_size=128, epochs=2, threads=1)
WEIGHTS = [(0.3, 0, 0), (0, 1.5, 0), (0, 0, 20.0), (0.3, 1.5, 20.0)]
WEAK = dict(ini_delta=0.1, ini_epsilon=30.0)  # weak enough to learn the task in a few hundred steps
CLASSES = 5
pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    return TrainConfig(**{**SETTINGS, "method": "ini", **changes})


@pytest.fixture(scope="module")
def ini(tmp_path_factory):
    """The run folder of a training."""
    folder = tmp_path_factory.mktemp("ini") / "ini"
    train(config(), folder, **QUIET)
    return folder


def rows(folder):
    return load_checkpoint(folder / "checkpoint.pt")["rows"]


def seeded(make):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make()


def batch():
    """float64 images, the labels of the first six, and a victim's logits."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 1, 8, 8, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(10, CLASSES, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (6,), generator=generator), logits


def by_hand(images, labels, logits, weight, bias, gamma, delta, epsilon):
    """The terms for a student s = W x + b: ∇_W KL(p‖q) = (q − p)^T x / N, ∇_b its mean."""

    def gradient(target, x):
        difference = (x @ weight.T + bias).softmax(1) - target
        return torch.cat([(difference.T @ x).flatten(), difference.sum(0)]) / len(x)

    x, answers = images.flatten(1), logits.softmax(1)
    own, foreign = slice(6), slice(6, None)
    g, wanted = gradient(answers[own], x[own]), gradient(F.one_hot(labels, CLASSES), x[own])
    cosine = (g * wanted).sum() / (g * g).sum().sqrt() / (wanted * wanted).sum().sqrt()
    log_p = logits[foreign].log_softmax(1)
    away = (x[foreign] @ weight.T + bias - log_p + log_p.mean(1, keepdim=True)).abs().mean()
    pull = gradient(answers[foreign], x[foreign]).abs().mean()
    return gamma * away + delta * cosine + epsilon * pull


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_terms_of_a_linear_student_by_hand(weights):
    student = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))).double()
    images, labels, logits = batch()
    W, b = (value.detach() for value in student[1].parameters())
    logits.requires_grad_()
    found = sum(InI(student, *weights)(logits, labels, images))
    found.backward()
    assert all(value.grad is None for value in student.parameters())

    def wanted(z):
        return by_hand(images, labels, z, W, b, *weights)

    z = logits.detach()
    torch.testing.assert_close(found, wanted(z))
    slopes = torch.zeros_like(z)
    for index in range(z.numel()):
        e = torch.zeros(z.numel(), dtype=torch.float64)
        e[index] = 1e-6
        e = e.view_as(z)
        slopes.view(-1)[index] = (wanted(z + e) - wanted(z - e)) / 2e-6
    torch.testing.assert_close(logits.grad, slopes, rtol=1e-5, atol=1e-8)


def everything_in_one_graph(student, images, labels, logits, gamma, delta, epsilon):
    """The terms for any student, with its parameters as one vector."""
    names, shapes = zip(*((n, v.shape) for n, v in student.named_parameters()), strict=True)
    flat = torch.cat([value.detach().flatten() for value in student.parameters()])

    def answers(vector, x):
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return functional_call(student, values, x)

    def kl(vector, z, x):
        p, log_q = z.softmax(1), answers(vector, x).log_softmax(1)
        return (p * (p.log() - log_q)).sum(1).mean()

    def gradient(loss):
        jacobian = torch.autograd.functional.jacobian
        return jacobian(loss, flat, create_graph=True)

    x, foreign, z, theirs = images[:6], images[6:], logits[:6], logits[6:]
    g = gradient(lambda vector: kl(vector, z, x))
    task = gradient(lambda vector: F.cross_entropy(answers(vector, x), labels)).detach()
    pull = gradient(lambda vector: kl(vector, theirs, foreign))
    log_p = theirs.log_softmax(1)
    away = answers(flat, foreign) - (log_p - log_p.mean(1, keepdim=True))
    cosine = g @ task / (g.norm() * task.norm())
    return gamma * away.abs().mean() + delta * cosine + epsilon * pull.abs().mean()


@pytest.mark.parametrize(
    ("name", "weights"), [*(("lenet", w) for w in WEIGHTS), ("mobilenetv2_small", WEIGHTS[-1])]
)
def test_the_terms_are_the_formula(name, weights):
    size = dict(in_channels=1, num_classes=CLASSES, image_size=8)
    student = seeded(lambda: models.build(name, **size)).double()
    images, labels, logits = batch()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = sum(InI(student, *weights)(ours, labels, images))
    wanted = everything_in_one_graph(student, images, labels, theirs, *weights)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(*pair)[0] for pair in ((found, ours), (wanted, theirs))]
    torch.testing.assert_close(*grads)
    assert not grads[0][:6].any() or weights[1]
    assert not grads[0][6:].any() or weights[0] or weights[2]


def test_the_terms_for_the_students_own_answers_and_for_labels():
    student = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))).double()
    images, labels, _ = batch()
    own = student(images).detach()
    found = sum(InI(student, 0.3, 0, 1000.0)(own, labels, images))
    # S's logits are not centred
    wanted = 0.3 * own[6:].mean(1).abs().mean()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    right = 60 * F.one_hot(torch.cat([labels, labels[:4]]), CLASSES).double()
    (found,) = InI(student, 0, 1.0, 0)(right, labels, images)
    torch.testing.assert_close(found, torch.ones_like(found))
    assert InI(student, 0.3, 0, 1000.0)(own[:6], labels, images[:6]) == []  # no proxies


def projected(gradients, orders):
    """PCGrad's gradient by its published algorithm, but with the mean instead of the sum."""
    found = []
    for own, order in enumerate(orders):
        g = gradients[own].clone()
        for other in order:
            along = g @ gradients[other]
            if other != own and along < 0:
                g -= along / gradients[other].norm() ** 2 * gradients[other]
        found.append(g)
    return sum(found) / len(found)


def test_conflicting_gradients_by_hand():
    def gradient(*vectors):
        w = nn.Parameter(torch.zeros(2))
        losses = [torch.tensor(vector) @ w for vector in vectors]
        return torch.autograd.grad(without_conflicts(losses, [w]), w)[0].tolist()

    # (1, 0) + (-1, 1) / 2 and (-1, 1) + (1, 0)
    assert gradient([1.0, 0.0], [-1.0, 1.0]) == [0.25, 0.75]
    assert gradient([2.0, 0.0], [2.0, 4.0]) == [2, 2]
    assert gradient([1.0, 0.0], [-3.0, 0.0]) == [0, 0]
    assert gradient([1.0, 0.0], [0.0, 0.0]) == [0.5, 0]
    assert gradient([1.0, 2.0]) == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_many_conflicting_gradients_by_the_algorithm(seed):
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    w = nn.Parameter(torch.zeros(3))
    torch.manual_seed(seed)
    loss = without_conflicts([vector @ w for vector in vectors], [w])
    torch.manual_seed(seed)
    wanted = projected(vectors.double(), torch.rand(5, 5).argsort(1).tolist())
    (found,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_step_adds_the_terms():
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)))
    student = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, CLASSES)))
    twin = copy.deepcopy(model).double()
    images, labels, _ = batch()
    ini, world = InI(student, 0.3, 1.0, 5.0), World()
    objective = Objective(config(), config(), world, list(model.parameters()), 0, thief=ini)
    do = Step(model, None, labels, world, objective, config(), config())
    torch.manual_seed(3)
    result = do(images[:6].float(), torch.arange(6), images[6:].float(), total=6)

    logits, student = twin(images), student.double()
    each = [(0, 1.0, 0), (0.3, 0, 0), (0, 0, 5.0)]  # in the order of the terms
    losses = [F.cross_entropy(logits[:6], labels)]
    losses += [everything_in_one_graph(student, images, labels, logits, *w) for w in each]
    gradients = [
        nn.utils.parameters_to_vector(
            torch.autograd.grad(loss, twin.parameters(), retain_graph=True)
        )
        for loss in losses
    ]
    torch.manual_seed(3)
    wanted = projected(gradients, torch.rand(4, 4).argsort(1).tolist())
    found = nn.utils.parameters_to_vector([value.grad for value in model.parameters()])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    sums = 6 * torch.stack([sum(losses), losses[0]]).detach()
    torch.testing.assert_close(result[:2], sums, rtol=1e-5, atol=0)
    assert result[2:].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.slow
def test_with_zero_weights_it_is_plain_training_bit_for_bit(ini, tmp_path):
    none = dict(ini_gamma=0.0, ini_delta=0.0, ini_epsilon=0.0)
    train(config(**none, proxy_share=2.0), tmp_path / "none", **QUIET)
    train(config(method="fp"), tmp_path / "fp", **QUIET)
    assert_same(tmp_path / "none", tmp_path / "fp")
    ours, theirs = (load_run(folder) for folder in (ini, tmp_path / "fp"))
    assert ours.fingerprint != theirs.fingerprint
    starts = [build_model(run.config, run.shape).state_dict() for run in (ours, theirs)]
    assert_equal(*starts)


def test_the_simulated_thief_does_not_start_from_the_victims_weights():
    shape = dict(in_channels=1, num_classes=10, image_size=[8, 8])
    one, same, other = (
        build_thief(config(), "lenet", seed, shape, torch.device("cpu")).student
        for seed in (0, 0, 1)
    )
    assert_equal(one.state_dict(), same.state_dict())
    assert not torch.equal(one.features[0][0].weight, other.features[0][0].weight)
    assert not torch.equal(
        one.features[0][0].weight, build_model(config(), shape).features[0][0].weight
    )
    assert build_thief(TrainConfig(), "lenet", 0, shape, torch.device("cpu")) is None


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(ini, tmp_path):
    train_interrupted(config(), tmp_path, 1)
    assert_same(tmp_path, ini)


@pytest.mark.slow
def test_a_replayed_step_gives_the_same_bits(ini, tmp_path, monkeypatch):
    def taped(function):
        state = torch.get_rng_state()  # a capture draws no random numbers, but the tape does
        captured = tape(function)
        torch.set_rng_state(state)
        return captured

    replay_steps(monkeypatch, taped)
    train(config(), tmp_path, **QUIET)
    assert_same(tmp_path, ini)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_has_no_host_sync(tmp_path, monkeypatch, precision):
    seen = host_reads(monkeypatch, step.Step, Proxies)
    train(config(epochs=1, precision=precision), tmp_path, **QUIET)
    assert len(seen) == 2 * 11 and not any(seen)


@pytest.mark.slow
def test_it_learns_the_task_and_its_terms(tmp_path):
    found = {}
    for method in ("fp", "ini"):
        folder = tmp_path / method
        train(config(method=method, batch_size=64, epochs=6, lr=0.2, **WEAK), folder, **QUIET)
        run = load_run(folder)
        splits = run.splits()
        assert read_json(folder / "summary.json")["test_accuracy"] > 0.6
        source = ProxySource(config().proxies, splits.train.image_shape, seed=0)
        foreign = next(Proxies(source, 0, World()).sample(splits.train))[:256]
        images, labels = splits.test.images[:256], splits.test.labels[:256]
        images = torch.cat([to_float(images), foreign])
        logits = run.model(images).detach()
        student = build_thief(config(), "lenet", 0, run.shape, torch.device("cpu")).student
        found[method] = [
            sum(InI(student, *weights)(logits, labels, images)).item() for weights in torch.eye(3)
        ]
    for row in rows(tmp_path / "ini"):
        assert row["loss"] != row["ce"] and row["divergence"] is None and "misled" not in row
    assert all(ours < theirs for ours, theirs in zip(found["ini"], found["fp"], strict=True))


@pytest.mark.slow
def test_ptq_from_an_ini_teacher(ini, tmp_path):
    train(config(method="ptq", teacher=str(ini), epochs=1), tmp_path, **QUIET)
    run = load_run(tmp_path)
    export_run(run, run.splits())
    assert verify_run(run, run.splits())["argmax_agreement"] > 0.98
    assert read_json(tmp_path / "summary.json")["method"] == "ptq"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(teacher="t"), "teacher: wanted none for method ini, got 't'"),
        (dict(ini_gamma=-1), "ini_gamma: wanted a number at least 0, got -1"),
        (dict(ini_delta="much"), "ini_delta: wanted a number at least 0, got 'much'"),
        (dict(ini_epsilon=float("inf")), "ini_epsilon: wanted a number at least 0, got inf"),
        (dict(accumulate=2), "method: wanted one process and accumulate = 1 with ini, .*1 and 2"),
        (dict(compile=True), "wanted compile = false and .* with ini, .* got compile = true"),
        (dict(precision="float16"), "wanted .* float32 or bfloat16 with ini, .* precision float16"),
        (dict(misdirect=0.1), "misdirect: wanted 0 with a method other than divqat"),
        (dict(proxies=("folder",)), "proxy_root: wanted a folder if proxies include 'folder'"),
        (dict(save_as_codes=True), "save_as_codes: wanted quantization-aware training"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_defaults_are_from_the_paper_and_several_processes_are_refused():
    found = config()
    assert (found.ini_gamma, found.ini_delta, found.ini_epsilon) == (0.3, 1.0, 1000.0)
    assert TrainConfig.from_dict(found.to_dict()) == found
    with pytest.raises(ConfigError, match=r"one process and accumulate = 1 with ini, .* got 2 and"):
        found.check_world_size(2)
    assert found.proxy_count(128) == 64
    assert found.uses_proxies and not config(ini_gamma=0, ini_epsilon=0).uses_proxies
