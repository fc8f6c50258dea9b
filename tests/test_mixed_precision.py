"""mixed_precision: within the budget, as cheap as brute force says, and applicable."""

import functools
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import build, images, settle
from testing import randn
from torch import nn

import divqat
from divqat._util.files import write_json
from divqat._util.settings import ConfigError
from divqat.nn import QuantLinear, QuantSpec
from divqat.quantize import knapsack
from divqat.quantize.layer_bits import format_layer_bits, parse_layer_bits, read_layer_bits

DATA = [(images(8, seed), torch.arange(8) % 5) for seed in (1, 2)]


def prepared(config="x86"):
    return settle(divqat.prepare(build("residual"), config, images()), 3)


@functools.cache
def ready():
    """A prepared model that no test changes."""
    return prepared()


def total(rows, choice):
    return sum(row[i] for row, i in zip(rows, choice, strict=True))


def test_no_other_choice_is_cheaper():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    for _ in range(100):
        items, options = int(draw(1, 6, 1)), int(draw(1, 5, 1))
        sizes = draw(1, 40, items, options).tolist()
        costs = (draw(-20, 60, items, options) / 16).tolist()  # exact sums, and ties
        least, most = sum(map(min, sizes)), sum(map(max, sizes))
        capacity = int(draw(least, most + 1, 1))
        choices = itertools.product(range(options), repeat=items)
        fitting = [choice for choice in choices if total(sizes, choice) <= capacity]
        best = min((total(costs, choice), total(sizes, choice)) for choice in fitting)
        got = knapsack.cheapest(sizes, costs, capacity)
        assert (total(costs, got), total(sizes, got)) == best


def test_a_thinned_search_fits_and_is_close(monkeypatch):
    sizes = [[n * bits for bits in range(2, 9)] for n in (101, 233, 379, 557, 811, 1009)]
    costs = [[weight * 4.0**-bits for bits in range(2, 9)] for weight in (9, 4, 7, 2, 5, 3)]
    capacity = 4 * sum(size[0] // 2 for size in sizes)
    best = total(costs, knapsack.cheapest(sizes, costs, capacity))
    monkeypatch.setattr(knapsack, "MOST", 300)
    got = knapsack.cheapest(sizes, costs, capacity)
    assert total(sizes, got) <= capacity and best <= total(costs, got) < 1.1 * best
    with pytest.raises(ValueError, match="capacity: wanted at least 6180, got 6179"):
        knapsack.cheapest(sizes, costs, 6179)


@pytest.mark.parametrize("criterion", ["divergence", "loss"])
def test_the_choice_is_the_best_of_all_by_its_costs(criterion):
    result = divqat.mixed_precision(ready(), DATA, 4.1, bits=[2, 4, 6], criterion=criterion)
    names = list(result.costs)
    assert names == ["conv1", "conv2", "head"]
    found = {}
    for widths in itertools.product([2, 4, 6], repeat=3):
        bits = dict(zip(names, widths, strict=True))
        if result.bits_per_weight(bits) <= 4.1:
            found[sum(result.costs[name][bits[name]] for name in names)] = bits
    assert result.layer_bits == found[min(found)]
    assert result.predicted == pytest.approx(min(found))
    assert result.bits_per_weight(result.layer_bits) <= 4.1


def test_what_it_says_is_what_a_prepared_model_does():
    model = ready()
    result = divqat.mixed_precision(model, DATA, 3.5, bits=[2, 3, 5])
    config = replace(divqat.preset("x86"), layer_bits=result.layer_bits)
    other = divqat.prepare(build("residual"), config, images())
    other.load_state_dict(model.state_dict())
    assert {name: getattr(other, name).weight_spec.bits for name in result.layer_bits} == (
        result.layer_bits
    )
    measured = divqat.sensitivity(other, DATA)
    assert (measured.floating, measured.quantized) == (result.floating, result.after)
    assert divqat.sensitivity(model, DATA).quantized == result.before
    weights = sum(m.weight.numel() for m in (model.conv1, model.conv2, model.head))
    assert result.to_dict()["bytes_before"] == 7 * weights / 8
    assert result.images == 16 and result.uniform_bits == 3


def test_one_width_for_all_costs_what_a_model_with_that_width_costs():
    result = divqat.mixed_precision(ready(), DATA, 5, bits=[2, 5])
    config = replace(divqat.preset("x86", weight_bits=5), first_last_bits=None)
    other = divqat.prepare(build("residual"), config, images())
    other.load_state_dict(ready().state_dict())
    assert divqat.sensitivity(other, DATA).quantized == result.uniform


def test_a_single_layer_costs_what_was_predicted():
    layer = QuantLinear(4, 3, weight_spec=QuantSpec(per_channel=True, narrow_range=True))
    model = nn.Sequential(layer)
    model(randn(6, 4))
    result = divqat.mixed_precision(model, [randn(20, 4, seed=1)], 3.9)
    assert result.layer_bits == {"0": 3}
    assert result.measured == result.predicted == result.costs["0"][3]
    assert result.after == result.uniform


@pytest.mark.parametrize("exact", [0, 1])
def test_first_and_last_layer_are_chosen_by_their_numbers(exact):
    """Weights of -1, 0 and 1 lose nothing with 2 bits, in whichever layer they are."""
    spec = QuantSpec(bits=7, narrow_range=True, per_channel=True)
    model = nn.Sequential(*(QuantLinear(6, 6, weight_spec=spec) for _ in range(2)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            values = randn(6, 6, seed=i)
            layer.weight.copy_(values.sign() if i == exact else values)
        model(randn(50, 6))
    result = divqat.mixed_precision(model, [randn(50, 6, seed=3)], 4.5)
    assert result.layer_bits == {str(exact): 2, str(1 - exact): 7}
    assert result.costs[str(exact)][2] < 1e-6  # of its rounded bias


def test_eight_bits_only_where_they_cannot_saturate():
    assert {*divqat.mixed_precision(ready(), DATA[:1], 8).costs["head"]} == {*range(2, 8)}
    result = divqat.mixed_precision(prepared("tensorrt"), DATA[:1], 8)
    assert {*result.costs["head"]} == {*range(2, 9)}
    asked = divqat.mixed_precision(ready(), DATA[:1], 8, bits=[8])
    assert set(asked.layer_bits.values()) == {8}


def test_export_writes_the_chosen_widths():
    config = replace(divqat.preset("x86"), layer_bits={"conv1": 3, "head": 5})
    model = prepared(config)
    with torch.no_grad():
        wanted = model.eval()(images())
    converted = divqat.convert(model)
    for name, bits in {"conv1": 3, "conv2": 7, "head": 5}.items():
        codes = converted.get_submodule(name).weight
        spread = 2 ** (7 - bits)
        assert (codes % spread == 0).all()
        assert codes.abs().max() == spread * (2 ** (bits - 1) - 1)
    assert torch.allclose(converted(images()), wanted, atol=1e-5)


def test_layer_bits_come_before_first_and_last():
    config = replace(divqat.preset("x86", weight_bits=4), layer_bits={"head": 2})
    model = divqat.prepare(build("residual"), config, images())
    assert [m.weight_spec.bits for m in (model.conv1, model.conv2, model.head)] == [7, 4, 2]


def test_the_model_is_as_before():
    model = prepared()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    divqat.mixed_precision(model, DATA[:1], 3, bits=[2, 3])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.conv1.weight_spec.bits == 7


def test_text_and_json():
    result = divqat.mixed_precision(ready(), DATA[:1], 3)
    text = str(result)
    for word in ("cost at 2", "as prepared", "chosen", "all 3 bits", "predicted", "measured"):
        assert word in text
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["layer_bits"] == result.layer_bits


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(budget=1.9), ValueError, "budget: wanted at least 2 bits per weight, .*, got 1.9"),
        (dict(budget=float("nan")), ValueError, "budget: wanted at least 2 .*, got nan"),
        (dict(budget="4"), ValueError, "budget: wanted at least 2 .*, got '4'"),
        (dict(bits=[]), ValueError, "bits: wanted at least one width, got none"),
        (dict(bits=[1]), ValueError, "bits: wanted whole numbers from 2 to 8, got 1"),
        (dict(batches=iter(DATA)), TypeError, "batches: wanted a list or a loader"),
        (dict(criterion="sqnr"), ValueError, "criterion: wanted loss or divergence, got 'sqnr'"),
        (
            dict(criterion="loss", batches=[images()]),
            ValueError,
            "criterion: wanted divergence without labels, got loss",
        ),
        (dict(model=build("residual")), ValueError, "model: wanted a model made by divqat.prepare"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        divqat.mixed_precision(**{"model": ready(), "batches": DATA, "budget": 4, **arguments})


def test_the_example_of_the_docs_runs(capsys):
    page = Path(__file__).parent.parent / "docs" / "own-model.md"
    *_, code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {"float_model": build("residual").eval(), "images": images()}
    exec(code, names | {"loader": DATA, "validation": DATA[:1]})
    assert "predicted" in capsys.readouterr().out


def test_layer_bits_of_no_layer_are_refused():
    for bits, message in {
        "conv3": r"layer_bits: unknown layer 'conv3' \(did you mean 'conv",
        "bn1": "layer_bits: unknown layer 'bn1'",
    }.items():
        config = replace(divqat.preset("x86"), layer_bits={bits: 4})
        with pytest.raises(ValueError, match=message):
            divqat.prepare(build("residual"), config, images())
    for bits in (1, 9, 4.0, "4", True):
        with pytest.raises(ValueError, match="layer_bits: wanted 2 to 8 bits for 'head', got"):
            replace(divqat.preset("x86"), layer_bits={"head": bits})


def test_layer_bits_as_text():
    bits = {"a.0": 2, "b=c": 8}
    assert parse_layer_bits(format_layer_bits(bits)) == bits
    for text in ("a", "a=", "=4", "a=1", "a=9", "a=4.0", "a=44"):
        with pytest.raises(ConfigError, match=f"layer_bits: wanted LAYER=BITS .*, got '{text}'"):
            parse_layer_bits([text])
    with pytest.raises(ConfigError, match="layer_bits: wanted each layer once, got 'a' twice"):
        parse_layer_bits(["a=4", "a=5"])


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    file = tmp_path / "mixed_precision.json"
    with pytest.raises(FileNotFoundError, match="layer_bits: wanted the mixed_precision"):
        read_layer_bits(file)
    write_json(file, {"layer_bits": {"a": 4}})
    assert read_layer_bits(file) == {"a": 4}
    file.write_text(file.read_text().replace("4", "5", 1))
    with pytest.raises(ValueError, match="mixed_precision"):
        read_layer_bits(file)
    for value, message in [
        ({"epochs": 3}, "wanted the mixed_precision.json of .*, got the keys epochs"),
        ({"layer_bits": [4]}, "layer_bits: wanted bits by layer, got"),
        ({"layer_bits": {}}, "layer_bits: wanted bits by layer, got"),
        ({"layer_bits": {"a": 9}}, "layer_bits: wanted 2 to 8 bits for 'a', got '9'"),
        ({"layer_bits": {"a": "4"}}, "layer_bits: wanted 2 to 8 bits for 'a', got '4'"),
    ]:
        write_json(file, value)
        with pytest.raises(ValueError, match=message) as caught:
            read_layer_bits(file)
        assert str(file) in str(caught.value)
