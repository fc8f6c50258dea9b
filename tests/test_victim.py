import pytest
import torch
from testing import randn
from torch import nn

from divqat.victim import QueryBudgetExceeded, Victim
from divqat.victim.runners import logits_function

IMAGES = randn(5, 1, 2, 2)


def flat(images):
    """A model with four classes: its logits are the pixels."""
    return images.flatten(1)


def test_probs_are_the_softmax_of_the_logits():
    answers = Victim(flat)(IMAGES)
    assert answers.dtype == torch.float32
    wanted = IMAGES.flatten(1).exp()
    torch.testing.assert_close(answers, wanted / wanted.sum(1, keepdim=True))


def test_label_is_one_hot():
    answers = Victim(flat, answer="label")(IMAGES)
    assert torch.equal(answers, nn.functional.one_hot(IMAGES.flatten(1).argmax(1), 4).float())


def test_topk_keeps_the_largest_without_renormalizing():
    probs = Victim(flat)(IMAGES)
    answers = Victim(flat, answer="topk", k=2)(IMAGES)
    assert ((answers > 0).sum(1) == 2).all()
    assert torch.equal(answers[answers > 0], probs[answers > 0])
    assert torch.equal(answers.sum(1), probs.topk(2).values.sum(1))


def test_topk_of_all_classes_is_everything():
    assert torch.equal(Victim(flat, answer="topk", k=4)(IMAGES), Victim(flat)(IMAGES))


@pytest.mark.parametrize("answer", [{"answer": "label"}, {"answer": "topk", "k": 1}])
def test_ties_go_to_the_lower_class(answer):
    tied = torch.tensor([[0.0, 3, 3, 3], [1, 1, 0, 1]]).view(2, 1, 2, 2)
    assert Victim(flat, **answer)(tied).argmax(1).tolist() == [1, 0]
    assert ((Victim(flat, **answer)(tied) > 0).sum(1) == 1).all()


def test_rounded_is_not_renormalized():
    answers = Victim(flat, answer="rounded", decimals=1)(IMAGES)
    torch.testing.assert_close(answers * 10, (answers * 10).round())
    even = torch.zeros(1, 1, 2, 2)
    assert Victim(flat, answer="rounded", decimals=1)(even).tolist() == [[pytest.approx(0.2)] * 4]
    assert Victim(flat, answer="rounded", decimals=0)(even).sum() == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_does_not_matter(batch_size):
    assert torch.equal(Victim(flat, batch_size=batch_size)(IMAGES), Victim(flat)(IMAGES))


def test_counts_every_image():
    victim = Victim(flat, batch_size=2)
    assert (victim.queries, victim.remaining) == (0, None)
    victim(IMAGES)
    victim(IMAGES[:1])
    assert victim.queries == 6


def test_budget_is_checked_before_anything_is_answered():
    asked = []

    def model(images):
        asked.append(len(images))
        return flat(images)

    victim = Victim(model, query_budget=7, batch_size=2)
    victim(IMAGES)
    assert (victim.queries, victim.remaining) == (5, 2)
    with pytest.raises(QueryBudgetExceeded, match="got 5 images, but 2 of 7"):
        victim(IMAGES)
    assert (victim.queries, victim.remaining, sum(asked)) == (5, 2, 5)
    victim(IMAGES[:2])
    assert victim.remaining == 0


def test_answers_can_be_trained_on():
    weight = torch.zeros(4, requires_grad=True)
    (Victim(flat)(IMAGES) * weight).sum().backward()  # an inference tensor would raise here
    assert weight.grad is not None


def test_public_attributes_do_not_lead_to_the_model():
    model = nn.Flatten().eval()
    victim = Victim(model)
    public = {name: getattr(victim, name) for name in dir(victim) if not name.startswith("_")}
    assert public == {"answer": "probs", "defense": "none", "queries": 0, "remaining": None}
    assert model not in vars(victim).values()


def test_module_runs_without_gradients_and_in_inference_mode():
    class Spy(nn.Module):
        def forward(self, x):
            assert torch.is_inference_mode_enabled()
            return x.flatten(1)

    Victim(Spy().eval())(IMAGES)
    with pytest.raises(AssertionError):
        Spy()(IMAGES)


def test_module_in_training_mode_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Dropout())
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        Victim(model)
    victim = Victim(model.eval())
    model[1].train()
    with pytest.raises(ValueError, match="'1' is in training mode"):
        victim(IMAGES)
    assert victim.queries == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_must_be_finite(bad):
    def model(images):
        logits = flat(images).clone()
        logits[1, 2] = bad
        return logits

    victim = Victim(model)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the logits of 1 of 5"):
        victim(IMAGES)
    assert victim.queries == 0


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES.to(torch.uint8), TypeError, "to_float"),
        (IMAGES.numpy(), TypeError, "wanted a Tensor"),
        (IMAGES[0], ValueError, r"\[N, C, H, W\]"),
        (IMAGES[:0], ValueError, "at least 1"),
        (IMAGES / 0, ValueError, "finite"),
    ],
)
def test_images_are_checked(images, error, message):
    with pytest.raises(error, match=message):
        Victim(flat)(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer": "prob"}, "did you mean 'probs'"),
        ({"answer": "topk"}, "k: answer='topk' needs"),
        ({"answer": "topk", "k": 0}, "k: "),
        ({"answer": "rounded"}, "decimals: "),
        ({"k": 3}, "k: only answer='topk'"),
        ({"answer": "topk", "k": 1, "decimals": 1}, "decimals: only"),
        ({"query_budget": -1}, "query_budget"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Victim(flat, **arguments)


def test_k_above_the_number_of_classes():
    victim = Victim(flat, answer="topk", k=5)
    with pytest.raises(ValueError, match="at most the 4 classes, got 5"):
        victim(IMAGES)
    assert victim.queries == 0


def test_model_must_answer_one_row_of_logits_per_image():
    with pytest.raises(ValueError, match=r"\[5, num_classes\] of at least 2 classes, got \[20\]"):
        Victim(lambda images: images.flatten())(IMAGES)
    with pytest.raises(ValueError, match=r"at least 2 classes, got \[5, 1\]"):
        Victim(lambda images: images.flatten(1)[:, :1])(IMAGES)
    with pytest.raises(TypeError, match="got tuple"):
        Victim(lambda images: (flat(images),))(IMAGES)
    with pytest.raises(TypeError, match="got int"):
        Victim(3)


def test_a_function_as_defense_has_a_name_that_another_process_gives_it_too():
    def halved(probs, images):
        return probs / 2

    assert Victim(flat, defense=halved).defense.endswith("halved")


def test_answer_names():
    assert Victim(flat, answer="topk", k=3).answer == "top3"
    assert Victim(flat, answer="rounded", decimals=2).answer == "rounded2"
    assert repr(Victim(flat)) == "Victim(probs, queries=0, remaining=None)"


def test_other_float_types_are_converted():
    assert torch.equal(Victim(flat)(IMAGES.double()), Victim(flat)(IMAGES))


def test_logits_function_gives_logits():
    assert torch.equal(logits_function(flat)(IMAGES), IMAGES.flatten(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_go_to_the_device_of_the_module():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval().cuda()
    assert Victim(model)(IMAGES).device.type == "cpu"


def test_defense_comes_before_what_is_shown():
    seen = []

    def reverse(probs, images):
        seen.append((probs, images))
        return probs.flip(1)

    probs = Victim(flat)(IMAGES)
    assert torch.equal(Victim(flat, defense=reverse, batch_size=2)(IMAGES), probs.flip(1))
    assert torch.equal(torch.cat([images for _, images in seen]), IMAGES)
    label = Victim(flat, answer="label", defense=reverse)(IMAGES)
    assert torch.equal(label, Victim(flat, answer="label")(IMAGES).flip(1))
    rounded = Victim(flat, answer="rounded", decimals=1, defense=reverse)(IMAGES)
    assert torch.equal(rounded, probs.flip(1).round(decimals=1))


@pytest.mark.parametrize(
    "broken", [lambda probs, images: probs[:, :2], lambda probs, images: probs / 0]
)
def test_defense_that_breaks_costs_no_query(broken):
    victim = Victim(flat, defense=broken)
    with pytest.raises(ValueError, match=r"defense: wanted finite \[5, 4\]"):
        victim(IMAGES)
    assert victim.queries == 0
