from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from toys import QUERIES, TEST_IMAGES, same_bits, toy_model, toy_victim

from divqat._util.files import load_checkpoint
from divqat._util.settings import option
from divqat.attacks import KnockoffNets, folder, recovery
from divqat.attacks.ddae import DDAE, DDAEPlus, recovery_network, reinitialized, train
from divqat.attacks.partial_bayes import PartialBayes
from divqat.attacks.training import Training
from divqat.data import to_float
from divqat.defenses import Defense
from divqat.defenses.modelguard import ModelGuardS
from divqat.metrics import predict
from divqat.victim import Victim

pytestmark = pytest.mark.usefixtures("one_thread")

CLONE = toy_model(seed=1)
QUICK = {"epochs": 2, "query_budget": 200, "batch_size": 16, "pairs": 4_000}
ATTACKS = [
    PartialBayes(**QUICK),
    DDAEPlus(**QUICK, recovery_epochs=40),
    DDAE(**QUICK, recovery_epochs=100, shadows=4, shadow_epochs=5),
]
EACH = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)


@dataclass(frozen=True, kw_only=True)
class Bent(Defense):
    """y' ~ y - beta (sigmoid(gamma logit(y)) - 1/2), the reverse sigmoid."""

    keeps_top1: ClassVar[bool] = False
    strength: ClassVar[str | None] = "beta"
    beta: float = option(0.8, "Amplitude.", least=0)

    def __call__(self, probs, images):
        bend = self.beta * (torch.sigmoid(0.2 * torch.logit(probs, eps=1e-7)) - 0.5)
        bent = (probs - bend).clamp(min=0)
        return bent / bent.sum(1, keepdim=True)


class Noisy:
    """Remembers how often it was called, and answers accordingly."""

    calls = 0

    def __str__(self):
        return "Noisy"

    def __call__(self, probs, images):
        self.calls += 1
        noise = torch.rand(probs.shape, generator=torch.Generator().manual_seed(self.calls))
        return (probs + noise) / (1 + noise.sum(1, keepdim=True))


@pytest.fixture(scope="module")
def model():
    """A victim that is sometimes unsure."""
    model = toy_victim()
    with torch.no_grad():
        model[-1].weight /= 2
        model[-1].bias /= 2
    return model


def recovered(attack, model, defense, path):
    """Clean, released and recovered answers."""
    victim = Victim(model, defense=defense)
    images, released = attack(victim, QUERIES, CLONE, resume_dir=path).transfer_set
    clean = Victim(model)(to_float(images))
    return clean, released, load_checkpoint(path / "recovered.pt")["answers"]


def distance(a, b):
    return (a - b).abs().sum(1).mean().item()


@EACH
def test_recovered_answers_are_nearer_to_the_clean_ones(attack, model, tmp_path):
    clean, released, estimate = recovered(attack.against(Bent()), model, Bent(), tmp_path)
    torch.testing.assert_close(estimate.sum(1), torch.ones(200))
    assert distance(released, clean) > 0.5
    assert distance(estimate, clean) < 0.6 * distance(released, clean)


@EACH
def test_it_is_the_knowledge_of_the_defense_that_recovers(attack, model, tmp_path):
    clean, released, estimate = recovered(attack.against(Bent(beta=0)), model, Bent(), tmp_path)
    assert distance(estimate, clean) > 0.8 * distance(released, clean)


@EACH
def test_unknown_defense_costs_no_query(attack, model):
    victim = Victim(model)
    name = type(attack).__name__
    with pytest.raises(
        RuntimeError, match=rf"{name} needs to know the defense: call {name}\(\.\.\."
    ):
        attack(victim, QUERIES, CLONE)
    with pytest.raises(RuntimeError):  # no field, so a changed copy forgets it, and says so
        replace(attack.against(Bent()), seed=1)(victim, QUERIES, CLONE)
    assert victim.queries == 0


@EACH
def test_without_a_defense_there_is_nothing_to_recover(attack, model):
    plain = KnockoffNets.from_dict({k: v for k, v in QUICK.items() if k != "pairs"})
    extraction = attack.against(None)(Victim(model), QUERIES, CLONE)
    assert same_bits(extraction.clone, plain(Victim(model), QUERIES, CLONE).clone)


@EACH
def test_queries_are_those_of_the_transfer_set(attack, model):
    victim = Victim(model, defense=Bent(), query_budget=200)
    extraction = attack.against(Bent())(victim, QUERIES, CLONE)
    images, answers = extraction.transfer_set
    assert extraction.queries == victim.queries == len(images) == 200
    assert torch.equal(answers, Victim(model, defense=Bent())(to_float(images)))


@EACH
def test_clone_learns_the_recovered_answers(attack, model, monkeypatch, tmp_path):
    learned = []
    monkeypatch.setattr(Training, "run", lambda self, x, targets, *_: learned.append(targets))
    if isinstance(attack, DDAE):  # its shadows need a training that works
        monkeypatch.setattr(DDAE, "_prior", lambda self, task, x, y: self._dirichlet(y))
    labels = replace(attack, reading="label").against(Bent())
    *_, estimate = recovered(labels, model, Bent(), tmp_path)
    assert torch.equal(learned[0], torch.eye(4)[estimate.argmax(1)])


def test_defense_with_a_memory_is_left_alone(model):
    theirs, known = Noisy(), Noisy()
    knowing = ATTACKS[0].against(known)
    runs = [knowing(Victim(model, defense=theirs), QUERIES, CLONE) for _ in range(2)]
    assert (theirs.calls, known.calls) == (2, 0)
    theirs.calls = 0
    again = knowing(Victim(model, defense=theirs), QUERIES, CLONE)
    assert same_bits(again.clone, runs[0].clone) and not same_bits(again.clone, runs[1].clone)
    # Where victim and attacker were given the same object, too.
    shared = Noisy()
    extraction = ATTACKS[0].against(shared)(Victim(model, defense=shared), QUERIES, CLONE)
    assert same_bits(extraction.clone, again.clone)


class Killed(Exception):
    pass


# The checkpoints: 0 the clone, 1 answers, 2-25 the shadows of DDAE, recovered answers, 2 epochs.
@pytest.mark.parametrize(
    ("attack", "when"),
    [(ATTACKS[0], 2), (ATTACKS[0], 3), (ATTACKS[2], 9), (ATTACKS[2], 27)],
)
def test_killed_run_goes_on_bit_identically(model, tmp_path, monkeypatch, attack, when):
    attack = attack.against(Bent())
    whole = attack(Victim(model, defense=Bent()), QUERIES, CLONE)
    save, names = folder.save_checkpoint, []

    def save_or_die(path, state):
        if len(names) == when:
            raise Killed
        names.append(path.name)
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_checkpoint", save_or_die)
        with pytest.raises(Killed):
            attack(Victim(model, defense=Bent()), QUERIES, CLONE, resume_dir=tmp_path)
    victim = Victim(model, defense=Bent(), query_budget=0)
    resumed = attack(victim, QUERIES, toy_model(seed=9), resume_dir=tmp_path)
    assert same_bits(resumed.clone, whole.clone)
    assert resumed.queries == 200


def test_folder_of_another_known_defense_is_refused(model, tmp_path):
    victim = Victim(model, defense=Bent())
    ATTACKS[0].against(Bent())(victim, QUERIES, CLONE, resume_dir=tmp_path)
    with pytest.raises(ValueError, match=r"against is Bent\(beta=0\.8\) there, Bent\(beta=0\.1\)"):
        ATTACKS[0].against(Bent(beta=0.1))(victim, QUERIES, CLONE, resume_dir=tmp_path)


@pytest.mark.parametrize("released", [torch.ones(3, 4), torch.full((4_000, 4), float("nan"))])
def test_known_defense_that_answers_nonsense(model, released):
    attack = ATTACKS[0].against(lambda probs, images: released[: len(probs)])
    with pytest.raises(ValueError, match=r"against: wanted finite \[4000, 4\]"):
        attack(Victim(model), QUERIES, CLONE)


def test_each_made_up_answer_goes_with_its_image(monkeypatch):
    monkeypatch.setattr(recovery, "ROWS", 7)
    attack = PartialBayes().against(lambda probs, images: probs * images.mean((1, 2, 3))[:, None])
    probs, rows = torch.rand(30, 4), torch.randint(5, (30,))
    wanted = torch.stack(
        [p * to_float(QUERIES[r]).mean() for p, r in zip(probs, rows, strict=True)]
    )
    answers = torch.full((5, 4), 0.25)
    torch.testing.assert_close(attack._release(probs, QUERIES[:5], rows, answers), wanted)


def test_a_defense_that_remembers_is_known_to_remember_what_it_released():
    defense = ModelGuardS(epsilon=0.6)
    clean = torch.distributions.Dirichlet(torch.full((200, 4), 0.3)).sample()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made_up = torch.distributions.Dirichlet(torch.full((3_000, 4), 0.3)).sample()
    answers = defense.fit(None)(clean, to_float(QUERIES[:200]))
    attack = PartialBayes().against(defense)
    rows = torch.arange(3_000) % 200
    released = attack._release(made_up, QUERIES[:200], rows, answers)
    shown = {tuple(row) for row in answers.tolist()}
    near = (made_up[:, None] - answers).abs().sum(2) <= 0.6
    same_top = made_up.argmax(1)[:, None] == answers.argmax(1)
    known = (near & same_top).any(1)
    assert known.float().mean() > 0.5
    assert all(tuple(row) in shown for row in released[known].tolist())


def test_prior_has_the_moments_of_its_two_halves():
    answers = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.0, 0.5, 0.5]])
    torch.manual_seed(0)
    probs, rows = PartialBayes(pairs=80_001)._dirichlet(answers)
    assert rows.bincount().tolist() == [40_001, 40_000]
    for row, answer in enumerate(answers):
        near = probs[:40_000][rows[:40_000] == row]
        torch.testing.assert_close(near.mean(0), answer, atol=3e-3, rtol=0)
        # Var[y] = m (1 - m) / (alpha_0 + 1), alpha_0 = 8 C
        torch.testing.assert_close(near.var(0), answer * (1 - answer) / 33, atol=3e-4, rtol=0)
        corners = probs[40_000:][rows[40_000:] == row]
        torch.testing.assert_close(corners.mean(0), torch.full((4,), 0.25), atol=0.01, rtol=0)
        torch.testing.assert_close(corners.var(0), torch.full((4,), 0.1875 / 2), atol=3e-3, rtol=0)


def test_shadows_answer_what_they_did_not_learn(model, monkeypatch):
    learned, seen = [], []
    run = Training.run

    def spy(self, images, targets, *loss):
        learned.append({image.numpy().tobytes() for image in images})
        seen.append(targets)
        return run(self, images, targets, *loss)

    monkeypatch.setattr(Training, "run", spy)
    asked = []

    def known(probs, images):
        asked.extend(image.numpy().tobytes() for image in images)
        return Bent()(probs, images)

    attack = DDAE(
        query_budget=31, shadows=3, shadow_epochs=1, recovery_epochs=1, epochs=1, pairs=40
    )
    images, answers = attack.against(known)(Victim(model), QUERIES, CLONE).transfer_set
    assert [len(half) for half in learned] == [15, 15, 15, 31]  # the shadows, then the clone
    assert learned[0] != learned[1] and len(asked) == 40  # 40 of the 48 pairs
    labels = dict(zip([image.numpy().tobytes() for image in images], answers, strict=True))
    for targets in seen[:3]:
        assert set(targets.flatten().tolist()) == {0.0, 1.0}
    everything = {to_float(image).numpy().tobytes() for image in images}
    assert set(asked) <= everything and len(labels) == 31


def test_one_image_is_enough(model):
    attack = DDAE(query_budget=1, shadows=2, shadow_epochs=1, recovery_epochs=1, epochs=1)
    assert attack.against(Bent())(Victim(model), QUERIES, CLONE).queries == 1


def test_shadows_start_from_weights_of_their_own():
    before = predict(CLONE.eval(), TEST_IMAGES)
    a, b, c = (reinitialized(CLONE, seed) for seed in (0, 0, 1))
    assert same_bits(a, b) and not same_bits(a, c) and not same_bits(a, CLONE)
    assert torch.equal(predict(CLONE, TEST_IMAGES), before)


@pytest.mark.parametrize(
    ("classes", "widths"),
    [
        (10, [128, 64]),
        (43, [512, 256]),
        (100, [1024, 512]),
        (200, [2048, 1024]),
        (256, [2048, 1024]),
    ],
)
def test_restorer_has_the_published_widths(classes, widths):
    linear = [m for m in recovery_network(classes) if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [*widths, classes]
    out = recovery_network(classes).eval()(torch.rand(3, classes))
    torch.testing.assert_close(out.sum(1), torch.ones(3))


def test_restorer_learns_to_undo_a_temperature():
    torch.manual_seed(0)
    clean = torch.distributions.Dirichlet(torch.full((4,), 0.25)).sample((4097,))  # one left over
    softened = (clean.clamp(min=1e-6).log() / 3).softmax(1)
    network = recovery_network(4)
    train(network, softened, clean, 50)
    fresh = torch.distributions.Dirichlet(torch.full((4,), 0.25)).sample((1000,))
    softened = (fresh.clamp(min=1e-6).log() / 3).softmax(1)
    with torch.no_grad():
        assert distance(network.eval()(softened), fresh) < 0.3 * distance(softened, fresh)
