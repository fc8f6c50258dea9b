"""Shadow victims: what they learn, and what is learned from them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import QUERIES, Killed, kill_at, same_bits, toy_images, toy_model, toy_victim

from divqat.attacks import KnockoffNets, Shadow, attack, shadow
from divqat.attacks.ddae import restorer, train
from divqat.attacks.folder import Folder
from divqat.attacks.shadow import as_shown, fitted, misdirecting
from divqat.attacks.training import Training
from divqat.data import ImageSet, to_float
from divqat.data.batches import to_uint8
from divqat.data.proxies import proxy_batch
from divqat.evaluate import predict
from divqat.evaluate.metrics import softmax
from divqat.options import ConfigError
from divqat.train.decoy import Decoy, coarse
from divqat.train.learning import PROXIES
from divqat.victim import QueryBudgetExceeded, Victim

pytestmark = pytest.mark.usefixtures("one_thread")

CLONE = toy_model(seed=1, dropout=0.3)
OWNED = ImageSet(*toy_images(60, seed=6))
QUICK = Shadow(
    query_budget=100, epochs=2, batch_size=32, shadows=2, shadow_epochs=2, shadow_batch_size=20,
    shadow_pad=1, proxy_share=0.5, recovery_epochs=2,
)  # fmt: skip
MODEL = toy_victim()


# what a shadow learns


class Dark(nn.Module):
    """A decoy for the tests: class 1 where the mean is above 0, else class 0."""

    def forward(self, images):
        return (images.mean((1, 2, 3)) > 0).long()


class Seen(nn.Module):
    """Logits of the mean shade, and what came in."""

    def forward(self, images):
        self.images = images
        shade = images.mean((1, 2, 3))
        return torch.stack([shade, 2 * shade + 0.5, torch.zeros_like(shade)], 1)


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (2.0, 12), (0.01, 1)])
def test_the_loss_of_a_shadow_by_hand(share, count):
    images, labels = OWNED.images[:6], torch.tensor([0, 1, 2, 0, 1, 2])
    network, targets = Seen(), F.one_hot(labels, 3).float()
    torch.manual_seed(3)
    found = misdirecting(Dark(), 0.7, share)(network, to_float(images), targets, 0.5)
    assert torch.equal(network.images[:6], to_float(images)) and len(network.images) == 6 + count

    def cross_entropy(image, label):
        shade = image.double().mean()
        logits = torch.stack([shade, 2 * shade + 0.5, 0 * shade])
        return (logits.exp().sum().log() - logits[label]).item()

    own = [cross_entropy(*pair) for pair in zip(network.images[:6], labels, strict=True)]
    proxies = network.images[6:]
    astray = [cross_entropy(image, int(image.double().mean() > 0)) for image in proxies]
    wanted = sum(own) / 6 + 0.7 * sum(astray) / count
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_the_proxies_are_those_of_the_batch_and_follow_from_the_global_seed():
    images, targets = to_float(OWNED.images[:7]), F.one_hot(OWNED.labels[:7], 4).float()
    network, loss = Seen(), misdirecting(Dark(), 0.2, 1.0)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss(network, images, targets[:, :3], 0.0)
        seen.append(network.images[7:])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    wanted = proxy_batch(PROXIES, OWNED.images[:7], generator, 7)
    assert torch.equal(to_uint8(seen[0]), wanted)


def test_a_decoy_is_fitted_to_proxies_of_the_labeled_images_and_has_its_own_seed():
    images = to_float(proxy_batch(PROXIES, OWNED.images, torch.Generator().manual_seed(9), 4000))
    decoy, other = fitted(OWNED, 4, 1), fitted(OWNED, 4, 2)
    assert same_bits(decoy, fitted(OWNED, 4, 1))
    assert torch.equal(decoy.rows, Decoy(4, 1, 1).rows)
    logits = (coarse(images) - decoy.mean).double() @ decoy.directions.double()
    # z has mean 0 and covariance 1 over proxies, so that W z has W W^T
    rows = decoy.rows.double()
    torch.testing.assert_close(logits.T.cov(), rows @ rows.T, rtol=0, atol=0.15)
    torch.testing.assert_close(logits.mean(0), torch.zeros(4).double(), rtol=0, atol=0.1)
    assert (decoy(images) == other(images)).double().mean() < 0.6


def spied(monkeypatch):
    """Every training: how many images, the loss, and copies of the network before and after."""
    seen, run = [], Training.run

    def spy(self, images, targets, loss):
        before = copy.deepcopy(self.task.clone)
        after = run(self, images, targets, loss)
        seen.append((self, images, loss, before, copy.deepcopy(after)))
        return after

    monkeypatch.setattr(Training, "run", spy)
    return seen


def test_shadows_learn_the_labels_then_the_defense(monkeypatch):
    seen = spied(monkeypatch)
    QUICK.owning(OWNED)(Victim(MODEL), QUERIES, CLONE)
    assert [len(images) for _, images, *_ in seen] == [60, 60, 60, 60, 100]
    names = [training.name for training, *_ in seen]
    assert names == [
        "shadow0.pt", "shadow0-defended.pt", "shadow1.pt", "shadow1-defended.pt", "clone.pt",
    ]  # fmt: skip
    settings = [training.attack for training, *_ in seen[:4]]
    assert {(a.epochs, a.lr, a.batch_size, a.pad) for a in settings} == {(2, 0.05, 20, 1)}
    losses = [loss is shadow.learn_labels.__defaults__[1] for _, _, loss, *_ in seen]
    assert losses == [True, False, True, False, True]
    first, on, other, _, clone = ((before, after) for _, _, _, before, after in seen)
    assert same_bits(first[1], on[0])  # it goes on
    assert not same_bits(first[0], other[0]) and not same_bits(first[0], CLONE)
    assert same_bits(clone[0], CLONE)


# what the network learns from


def test_pairs_are_rows_of_one_shadow_and_one_image(monkeypatch):
    """Each input is a shadow's defended answer and the image's coarse picture, each target the
    clean answer of the same shadow to the same image."""

    def answered(self, task, images, number, seed):
        key = images.double().mean((1, 2, 3)).float()  # tells the images apart
        return torch.stack([key, key + number], 1), torch.stack([-key, -key - number], 1)

    monkeypatch.setattr(Shadow, "_shadow", answered)
    images = QUERIES[:30]
    run = replace(QUICK, shadows=3, pairs=50)
    inputs, clean = run._pairs(None, images)
    assert inputs.shape == (50, 2 + 16) and clean.shape == (50, 2)
    assert torch.equal(inputs[:, :2], -clean)
    shades = {
        key.item(): row
        for key, row in zip(
            images.double().mean((1, 2, 3)).float(), coarse(to_float(images)), strict=True
        )
    }
    drawn = [(key.item(), round((both - key).item())) for key, both in clean]
    assert len(set(drawn)) == 50 and {number for _, number in drawn} == {0, 1, 2}
    for (key, _), row in zip(drawn, inputs, strict=True):
        assert torch.equal(row[2:], shades[key])
    every, _ = replace(run, pairs=1000)._pairs(None, images)
    alone, _ = replace(run, pictures=False, pairs=1000)._pairs(None, images)
    assert every.shape == (90, 18) and torch.equal(every[:, :2], alone)
    other, _ = replace(run, seed=1)._pairs(None, images)
    assert not torch.equal(other, inputs)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("probs", [0.52, 0.26, 0.22]),
        ("label", [1.0, 0.0, 0.0]),
        ("top2", [0.52 / 0.78, 0.26 / 0.78, 0]),
        ("rounded1", [0.5, 0.3, 0.2]),
    ],
)
def test_shadows_show_what_the_victim_shows(answer, wanted):
    probs = torch.tensor([[0.52, 0.26, 0.22]])
    torch.testing.assert_close(as_shown(probs, answer), torch.tensor([wanted]))
    torch.testing.assert_close(as_shown(as_shown(probs, answer), answer), torch.tensor([wanted]))


def test_a_victim_of_labels_is_imitated_in_labels(monkeypatch):
    learned = []
    monkeypatch.setattr(shadow, "train", lambda *args: learned.append(args[1]) or train(*args))
    found = QUICK.owning(OWNED)(Victim(MODEL, answer="label"), QUERIES, CLONE)
    assert found.queries == 100
    assert set(learned[0][:, :4].flatten().tolist()) == {0.0, 1.0}


def distance(a, b):
    return (a - b).abs().sum(1).mean().item()


def misdirected(model, weight):
    """``model`` trained on as a victim is, with a decoy and images that the thief has not."""
    images, labels = toy_images(800, seed=1)
    model, targets = copy.deepcopy(model), F.one_hot(labels, 4).float()
    loss = misdirecting(fitted(ImageSet(images, labels), 4, 77), weight, 1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model, to_float(images), targets, 0.0).backward()
        optimizer.step()
    return model.eval()


# the toys are noise around patterns; these are what a thief asks about
FOREIGN = proxy_batch(PROXIES, QUERIES, torch.Generator().manual_seed(5), 300)


def task_of(victim, images):
    return attack.Task(victim, images, CLONE, 4, Folder(None, {}), lambda *_: None)


def test_recovered_answers_are_nearer_to_the_clean_ones():
    victim = Victim(misdirected(MODEL, 1.0))
    clean, released = softmax(predict(MODEL, FOREIGN)), victim(to_float(FOREIGN))
    run = Shadow(
        shadows=3, shadow_epochs=20, shadow_batch_size=20, shadow_pad=0, misdirect=1.0,
        recovery_epochs=60,
    ).owning(OWNED)  # fmt: skip
    estimate = run._recover(task_of(victim, FOREIGN), FOREIGN, released)
    torch.testing.assert_close(estimate.sum(1), torch.ones(300))
    assert distance(released, clean) > 0.5
    assert distance(estimate, clean) < 0.95 * distance(released, clean)  # 0.89 in place of 1.03


def test_a_decoy_that_mixes_is_undone(monkeypatch):
    """y' = (y + t(x)) / 2 with the same t for all: with the picture, y can be told."""
    decoy = fitted(OWNED, 4, 5)

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(300, 4, generator=generator).mul(2).softmax(1)

    def mixed(clean, images):
        return (clean + F.one_hot(decoy(to_float(images)), 4)) / 2

    def answered(self, task, images, number, seed):
        clean = drawn(seed)
        return clean, mixed(clean, images)

    monkeypatch.setattr(Shadow, "_shadow", answered)
    clean = drawn(3)
    released = mixed(clean, FOREIGN)
    task = task_of(Victim(MODEL), FOREIGN)
    estimate = replace(QUICK, shadows=8, recovery_epochs=60)._recover(task, FOREIGN, released)
    assert distance(estimate, clean) < 0.6 * distance(released, clean)  # 0.35 in place of 0.72


def test_restorer_reads_more_than_answers():
    network = restorer(10, 26).eval()
    assert [m.in_features for m in network if isinstance(m, nn.Linear)] == [26, 128, 64]
    assert network(torch.rand(3, 26)).shape == (3, 10)


@pytest.mark.parametrize("reads", ["label", "standardized2"])
def test_the_clone_learns_the_recovered_answers(reads, monkeypatch):
    """With the reading as KnockoffNets has it, from the clone's own weights and the same seeds."""
    recovered = {"label": lambda answers: answers.flip(1), "standardized2": lambda answers: answers}
    monkeypatch.setattr(Shadow, "_recover", lambda *given: recovered[reads](given[-1]))
    found = replace(QUICK, reading=reads).owning(OWNED)(Victim(MODEL), QUERIES, CLONE)
    plain = KnockoffNets(query_budget=100, epochs=2, batch_size=32, reading=reads)
    wanted = plain(Victim(lambda images: recovered[reads](MODEL(images))), QUERIES, CLONE)
    assert same_bits(found.clone, wanted.clone)


# as all attacks


def test_queries_are_exact():
    victim = Victim(MODEL, query_budget=100)
    images, answers = QUICK.owning(OWNED)(victim, QUERIES, CLONE).transfer_set
    assert victim.queries == len(images) == 100
    assert torch.equal(answers, Victim(MODEL)(to_float(images)))
    with pytest.raises(QueryBudgetExceeded, match="needs 100 queries, the victim allows 99"):
        QUICK.owning(OWNED)(Victim(MODEL, query_budget=99), QUERIES, CLONE)


def test_labeled_images_that_are_not_there_or_do_not_fit_cost_no_query():
    victim = Victim(MODEL)
    with pytest.raises(RuntimeError, match=r"Shadow has to own labeled images: call Shadow\(\.\."):
        QUICK(victim, QUERIES, CLONE)
    wide = ImageSet(torch.zeros(3, 1, 8, 9, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"owning: wanted images of \[1, 8, 8\] .* \[1, 8, 9\]"):
        QUICK.owning(wide)(victim, QUERIES, CLONE)
    assert victim.queries == 0


def test_same_seed_same_bits():
    before = torch.get_rng_state()
    a, b, c = (
        replace(QUICK, seed=seed).owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone
        for seed in (0, 0, 1)
    )
    assert same_bits(a, b) and not same_bits(a, c)
    assert torch.equal(torch.get_rng_state(), before)


# The checkpoints: 0 the clone's first weights, 1-3 answers, 4-6 and 7-9 a shadow without and with
# the defense, 10-15 another, 16 the recovered answers, 17-18 the clone's epochs.
@pytest.mark.parametrize("when", [0.5, 2, 5, 6.5, 8, 9.5, 13.5, 16, 16.5, 18])
def test_killed_run_goes_on_bit_identically(when, tmp_path, monkeypatch):
    monkeypatch.setattr(attack, "QUERIES_PER_SAVE", 40)
    run = QUICK.owning(OWNED)
    whole = run(Victim(MODEL), QUERIES, CLONE)
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        with pytest.raises(Killed):
            run(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)
    again = toy_model(seed=9, dropout=0.3)  # its weights are not those of the first run
    resumed = run(Victim(MODEL, query_budget=100), QUERIES, again, resume_dir=tmp_path)
    assert same_bits(whole.clone, resumed.clone) and resumed.queries == 100
    nothing = Victim(MODEL, query_budget=0)
    assert same_bits(run(nothing, QUERIES, again, resume_dir=tmp_path).clone, whole.clone)
    other = ImageSet(OWNED.images, OWNED.labels.flip(0))
    with pytest.raises(ValueError, match="belongs to other settings: labeled is "):
        QUICK.owning(other)(Victim(MODEL), QUERIES, CLONE, resume_dir=tmp_path)


def test_a_diverging_shadow_names_its_learning_rate():
    with pytest.raises(
        FloatingPointError, match=r"shadow 0, whose lr is shadow_lr: .* loss is nan"
    ):
        replace(QUICK, shadow_lr=1e30).owning(OWNED)(Victim(MODEL), QUERIES, CLONE)


@pytest.mark.parametrize(
    "argument",
    [
        {"shadows": 0},
        {"shadow_epochs": 0},
        {"shadow_lr": 0.0},
        {"shadow_batch_size": 0},
        {"shadow_pad": -1},
        {"misdirect": 0.0},
        {"proxy_share": 0.0},
        {"pictures": 1},
        {"pairs": 0},
        {"recovery_epochs": 0},
        {"reading": "loud"},
    ],
)
def test_arguments_are_checked(argument):
    with pytest.raises(ConfigError, match=f"{next(iter(argument))}: wanted"):
        Shadow(**argument)


def test_settings_survive_yaml_and_bfloat16():
    run = Shadow.from_dict({**QUICK.to_dict(), "precision": "bfloat16"})
    clone = run.owning(OWNED)(Victim(MODEL), QUERIES, CLONE).clone
    assert next(clone.parameters()).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clone_trains_on_its_device():
    found = QUICK.owning(OWNED)(Victim(MODEL), QUERIES, copy.deepcopy(CLONE).cuda())
    assert all(state.is_cuda for state in found.clone.state_dict().values())
