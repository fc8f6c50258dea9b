"""MisdirectionLoss in a custom training loop."""

import warnings

import pytest
import torch
from captured import HostReads
from testing import randn
from torch.nn import functional as F

import divqat
from divqat import data, models
from divqat.data.batches import to_float, to_uint8
from divqat.data.proxies import PROXIES
from divqat.metrics import accuracy, predict
from divqat.nn import MisdirectionLoss

FEW = ("inverted", "shuffled", "noise")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def random_images(count=300, channels=1, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, 9, 12), generator=generator).to(torch.uint8)
    return to_float(images), torch.arange(count) % classes


def make_loss(batches=None, **changes):
    return MisdirectionLoss(batches or [random_images()], 5, **{"kinds": FEW, "seed": 0, **changes})


def test_the_loss_is_the_cross_entropy_to_the_decoy():
    misdirection, images = make_loss(), random_images(40)[0]
    logits = randn(40, 5).requires_grad_()
    misdirection(logits, images).backward()
    probs = misdirection.decoy(images).double()
    torch.testing.assert_close(probs.sum(1), torch.ones(40).double())
    # d mean CE / d logits = (softmax(logits) - t) / M
    expected = (logits.detach().double().softmax(1) - probs) / 40
    torch.testing.assert_close(logits.grad.double(), expected, rtol=0, atol=1e-7)
    told = (logits.argmax(1) == probs.argmax(1)).double().mean()
    assert 0 < told < 1 and float(misdirection.misled) == pytest.approx(float(told))
    assert misdirection(50 * probs.float(), images) < misdirection(-50 * probs.float(), images)


def test_a_decoy_uses_every_class():
    misdirection = make_loss()
    torch.manual_seed(0)
    proxies = misdirection.draw(random_images(2000)[0], share=1)
    assert misdirection.decoy(proxies).argmax(1).bincount(minlength=5).min() > 100
    other = make_loss(seed=1)
    same = misdirection.decoy(proxies).argmax(1) == other.decoy(proxies).argmax(1)
    assert same.double().mean() < 0.6


def test_proxies_depend_on_the_global_seed_and_are_half_as_many():
    misdirection, images = make_loss(), random_images(31)[0]
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(misdirection.draw(images))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert seen[0].shape == (16, 1, 9, 12) and seen[0].dtype == torch.float32
    assert misdirection.draw(images, share=0.001).shape == (1, 1, 9, 12)
    assert make_loss(kinds=("inverted",)).draw(images.bfloat16()).dtype == torch.bfloat16
    (dark,) = make_loss(kinds=("inverted",)).draw(-torch.ones(1, 1, 9, 12))
    assert torch.equal(dark, torch.ones(1, 9, 12))


# one number for all channels, or one per channel
@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.2), ([0.48, 0.45, 0.4], [0.23, 0.22, 0.225])])
def test_normalization_of_the_images_does_not_matter(mean, std):
    images, labels = random_images(channels=3)
    plain = make_loss([(images, labels)])
    column = [torch.tensor(value).view(-1, 1, 1) for value in (mean, std)]

    def scaled(images):
        return ((images + 1) / 2 - column[0]) / column[1]

    other = make_loss([(scaled(images), labels)], mean=mean, std=std)
    torch.testing.assert_close(other.decoy.directions, plain.decoy.directions)
    torch.manual_seed(0)
    proxies = plain.draw(images)
    torch.manual_seed(0)
    torch.testing.assert_close(other.draw(scaled(images)), scaled(proxies), rtol=0, atol=1e-5)
    logits = randn(len(proxies), 5)
    torch.testing.assert_close(plain(logits, proxies), other(logits, scaled(proxies)))


SCALES = {
    "0 to 255": (lambda x: 127.5 * (x + 1), {"mean": 0, "std": 1 / 255}),
    "0 to 1": (lambda x: (x + 1) / 2, {"mean": 0, "std": 1}),
    "-1 to 1": (lambda x: x, {}),
    "ImageNet's": (lambda x: ((x + 1) / 2 - 0.449) / 0.226, {"mean": 0.449, "std": 0.226}),
}


# (given, declared): the values use at most half of the declared range, or more of it.
HALF = [("0 to 1", "-1 to 1"), ("0 to 1", "0 to 255"), ("-1 to 1", "0 to 255")]
HALF += [("ImageNet's", "0 to 255")]
UNDETECTED = [("0 to 1", "ImageNet's"), ("-1 to 1", "ImageNet's")]


@pytest.mark.parametrize("declared", SCALES)
@pytest.mark.parametrize("given", SCALES)
def test_images_outside_the_declared_range_are_refused(given, declared):
    (own, labels), (scale, arguments) = random_images(), SCALES[declared]
    images, own = SCALES[given][0](own), scale(own)
    images = images.clamp(min=0) if (given, declared) == ("ImageNet's", "0 to 255") else images
    if given == declared:
        misdirection = make_loss([(images, labels)], **arguments)
        misdirection(randn(150, 5), misdirection.draw(images))
    elif (given, declared) in HALF:
        with pytest.warns(UserWarning, match="batches: with this mean and std x is only from"):
            make_loss([(images, labels)], **arguments)
    elif (given, declared) not in UNDETECTED:
        uses = {
            "batches": lambda: make_loss([(images, labels)], **arguments),
            "images": lambda: make_loss([(own, labels)], **arguments).draw(images),
            "proxies": lambda: make_loss([(own, labels)], **arguments)(randn(300, 5), images),
        }
        for name, use in uses.items():
            with pytest.raises(ValueError, match=rf"{name}: wanted \(x - mean\) / std with x from"):
                use()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(value):
    images, labels = random_images()
    images[7, 0, 2, 3] = value
    with pytest.raises(ValueError, match="batches: wanted"):
        make_loss([(images, labels)])


@pytest.mark.parametrize(
    ("channels", "count", "color", "kinds"),
    [
        *((1, count, color, FEW) for count in (1, 2, 40) for color in (None, -1.0, 0.3)),
        (3, 1, None, FEW),
        (3, 1, 0.3, (*PROXIES, "mixed", "thresholded")),
    ],
)
def test_single_images_and_constant_images(channels, count, color, kinds):
    images, labels = random_images(count, channels)
    images = images if color is None else torch.full_like(images, color)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "batches: with this mean and std")
        misdirection = make_loss([(images, labels)], kinds=kinds)
        for part in (images, images[:1]):
            proxies = misdirection.draw(part, labels[: len(part)], share=1)
            logits = randn(len(proxies), 5).requires_grad_()
            loss = misdirection(logits, proxies)
            loss.backward()
            assert proxies.isfinite().all() and loss.isfinite() and logits.grad.isfinite().all()
    answers = misdirection.decoy(images)
    torch.testing.assert_close(answers.sum(1), torch.ones(count))


def test_a_loader_is_read_only_until_the_sample_is_full():
    images, labels = random_images(5000)
    read = []

    def loader():
        for part in zip(images.split(100), labels.split(100), strict=True):
            read.append(len(part[0]))
            yield (*part, "an extra value of the loader")

    misdirection = make_loss(loader())
    assert sum(read) == 2100
    at_once = make_loss([(images[:2048], labels[:2048])])
    assert torch.equal(misdirection.decoy.directions, at_once.decoy.directions)


def test_the_state_is_the_decoy():
    images, labels = random_images(600)
    misdirection, other = (
        make_loss([(images[:300], labels[:300])]),
        make_loss([(images[300:], labels[300:])]),
    )
    state = misdirection.state_dict()
    assert list(state) == ["targets.decoy.mean", "targets.decoy.directions"]
    older = {name.removeprefix("targets."): value for name, value in state.items()}
    assert make_loss([(images[300:], labels[300:])]).load_state_dict(older)
    assert not torch.equal(misdirection.decoy(images), other.decoy(images))
    other.load_state_dict(misdirection.state_dict())
    assert torch.equal(misdirection.decoy(images), other.decoy(images))


def test_there_is_no_host_sync():
    misdirection, (images, labels) = (
        make_loss(kinds=(*PROXIES, "mixed", "thresholded")),
        random_images(32),
    )
    misdirection(randn(16, 5), misdirection.draw(images, labels))  # checks the first batch
    with HostReads() as reads:
        proxies = misdirection.draw(images, labels)
        misdirection(randn(16, 5), proxies)
    assert reads.seen == ["aten::_local_scalar_dense"]  # the seed, drawn on the CPU


def test_a_network_learns_misdirection_and_its_task():
    splits = data.load("digits")
    torch.manual_seed(0)
    float_model = models.build("lenet", in_channels=1, num_classes=10, image_size=8)
    learn(float_model, splits, lr=0.1, epochs=8)
    model = divqat.prepare(float_model.eval(), "x86", example_input=to_float(splits.test.images))
    loader = data.batches(splits.train, 64, generator=torch.Generator().manual_seed(1))
    misdirection = MisdirectionLoss(loader, 10, seed=0)
    proxies = misdirection.draw(to_float(splits.validation.images), share=2)

    def misled():
        logits = predict(model.eval(), to_uint8(proxies))
        misdirection(logits, proxies)
        return float(misdirection.misled)

    before = misled()
    learn(model, splits, lr=0.05, epochs=8, misdirection=misdirection)
    assert before < 0.2 and misled() > 0.4
    assert accuracy(predict(model, splits.test), splits.test.labels) > 0.93


def learn(model, splits, lr, epochs, misdirection=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(epoch)
        for images, labels in data.batches(splits.train, 64, generator=generator):
            if misdirection is None:
                loss = F.cross_entropy(model(images), labels)
            else:
                proxies = misdirection.draw(images)
                logits = model(torch.cat([images, proxies]))
                own, foreign = logits.tensor_split([len(images)])
                loss = F.cross_entropy(own, labels) + 0.8 * misdirection(foreign, proxies)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_refusals():
    images, labels = random_images(10)

    def check(message, *args, error=ValueError, **changes):
        with pytest.raises(error, match=message):
            make_loss(*args, **changes)

    with pytest.raises(ValueError, match=r"num_classes: wanted at least 2, got 1"):
        MisdirectionLoss([(images, labels * 0)], 1, seed=0)
    check(r"batches: wanted images, got none", iter([]))
    check(r"labels: wanted numbers \[N\] from 0 to 4, got \[10\] from 0 to 5",
          [(images, labels + labels // 4)])  # fmt: skip
    check(r"labels: wanted .* got \[10, 1\]", [(images, labels[:, None])])
    check(r"images: wanted floats, got torch.uint8",
          [(to_uint8(images), labels)], error=TypeError)  # fmt: skip
    check(r"images: wanted \[N, C, H, W\], got \[10, 108\]", [(images.flatten(1), labels)])
    check(r"images: wanted all \[1, 9, 12\], got \[1, 9, 6\]",
          [(images, labels), (images[..., ::2], labels)])  # fmt: skip
    check(r"mean, std: wanted 1 or 1 numbers, got 3 and 1", mean=[0.1, 0.2, 0.3])
    check(r"std: wanted above 0, got 0", std=0.0)
    check(r"unknown proxy 'clipart'", kinds=("clipart",))
    misdirection = make_loss()
    with pytest.raises(ValueError, match=r"logits: wanted \[10, 5\], got \[9, 5\]"):
        misdirection(randn(9, 5), images)
    with pytest.raises(ValueError, match=r"share: wanted above 0, got 0"):
        misdirection.draw(images, share=0)
