"""The trained networks in zoo/: files, cards and module agree."""

import hashlib
import shlex

import pytest
import torch
from testing import randn

import divqat
from bench.zoo import METHODS, ZOO, page
from divqat._util.files import load_checkpoint, read_json
from divqat._util.settings import given_flags
from divqat.cli.parser import build_parser
from divqat.quantize.deployed import IntegerLayer
from divqat.train.config import TrainConfig
from divqat.train.folder import MAY_DIFFER

NAMES = [f"{data}-{method}" for data in ("fashion-mnist", "cifar10", "gtsrb") for method in METHODS]
INT8 = [name for name in NAMES if not name.endswith("-fp")]


def test_every_file_has_a_card_and_is_what_the_card_says():
    assert divqat.zoo.names() == tuple(NAMES)
    hashes = {k: v for name in NAMES for k, v in divqat.zoo.card(name)["sha256"].items()}
    files = {path.name: path for path in ZOO.iterdir() if path.suffix in (".onnx", ".pt")}
    assert set(files) == set(hashes) == {f"{n}.pt" for n in NAMES} | {f"{n}.onnx" for n in INT8}
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == hashes[name]


def test_the_page_is_written_from_the_cards():
    cards = list(read_json(ZOO / "cards.json")["cards"])
    assert (ZOO / "README.md").read_text(encoding="utf-8") == page(cards)
    for name in INT8:
        assert f"\n## {name}\n" in page(cards)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_trains_with_the_settings_of_the_checkpoint(name):
    words = shlex.split(divqat.zoo.card(name)["recipe"])
    args = build_parser().parse_args(words[1:])
    stored = TrainConfig.from_dict(load_checkpoint(ZOO / f"{name}.pt")["config"])
    got = TrainConfig.from_dict(given_flags(args, TrainConfig))
    ignored = {*MAY_DIFFER} | stored.unused
    different = {k for k, v in stored.to_dict().items() if got.to_dict()[k] != v} - ignored
    assert not different
    assert not any(text.startswith("/") for text in words)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_has_the_shape_of_its_card(name):
    model, card = divqat.zoo.load(name), divqat.zoo.card(name)
    assert not any(module.training for module in model.modules())
    images = randn(3, card["shape"]["in_channels"], *card["shape"]["image_size"]).clamp(-1, 1)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (3, card["shape"]["num_classes"])
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", INT8)
def test_the_onnx_file_has_the_integers_of_the_prepared_network(name):
    onnx = pytest.importorskip("onnx")
    path = divqat.zoo.path(name)
    assert path.stat().st_size == divqat.zoo.card(name)["bytes"] < 300_000
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    layers = [m for m in divqat.convert(divqat.zoo.load(name)).modules() if type(m) is IntegerLayer]
    assert len(layers) == 6
    for layer in layers:
        for tensor in (layer.weight, layer.weight_scale, layer.bias):
            wanted = tensor.numpy()
            same = [a for a in stored if a.dtype == wanted.dtype and a.size == wanted.size]
            assert any((a.reshape(wanted.shape) == wanted).all() for a in same)


@pytest.mark.parametrize("name", INT8)
def test_the_onnx_file_answers_as_the_prepared_network(name):
    pytest.importorskip("onnxruntime")
    shape = divqat.zoo.card(name)["shape"]
    size = (50, shape["in_channels"], *shape["image_size"])
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (50, size[1], 4, 4), generator=generator).float()
    images = torch.nn.functional.interpolate(coarse, size[2:]).to(torch.uint8)
    labels = torch.zeros(50, dtype=torch.long)
    report = divqat.export.verify(divqat.zoo.load(name), divqat.zoo.path(name), images, labels)
    assert report.max_diff_steps < 3


def test_other_names_are_refused():
    for call in (divqat.zoo.load, divqat.zoo.card, divqat.zoo.path):
        with pytest.raises(ValueError, match="unknown network 'imagenet'; known: fashion-mnist-fp"):
            call("imagenet")
    with pytest.raises(ValueError, match="wanted an int8 network, got 'gtsrb-fp'"):
        divqat.zoo.path("gtsrb-fp")
