import pytest
import torch
import torch.fx

from divqat import models

NAMES = models.names()


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, in_channels=1, num_classes=10, image_size=8):
    return models.build(
        name, in_channels=in_channels, num_classes=num_classes, image_size=image_size
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("channels", "size"), [(1, 8), (1, 28), (3, 32), (2, 9), (4, (8, 13)), (3, (17, 10))]
)
def test_output_is_logits_for_any_channels_and_size(name, channels, size):
    height, width = (size, size) if isinstance(size, int) else size
    model = build(name, channels, 7, size)
    logits = model(torch.randn(2, channels, height, width))
    assert logits.shape == (2, 7) and logits.dtype == torch.float32
    assert logits.min() < 0 or logits.sum(1).sub(1).abs().max() > 1e-3  # no softmax at the end


@pytest.mark.parametrize("name", NAMES)
def test_is_fx_traceable_with_the_same_result(name):
    model = build(name).eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_is_made_of_layers_that_can_be_quantized(name):
    allowed = {"Conv2d", "BatchNorm2d", "ReLU", "ReLU6", "AdaptiveAvgPool2d", "MaxPool2d"}
    allowed |= {"Linear", "Flatten"}
    traced = torch.fx.symbolic_trace(build(name))
    called = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert {type(traced.get_submodule(node.target)).__name__ for node in called} <= allowed
    # Each activation is its own module: a shared one would get a single observer.
    assert len({node.target for node in called}) == len(called)


@pytest.mark.parametrize("name", NAMES)
def test_seed_determines_the_weights(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build(name).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", NAMES)
def test_initialization_keeps_the_scale(name):
    torch.manual_seed(0)
    model = build(name, 3, 10, 32).train()
    # Outputs of the last hidden layer stay of order 1, and every parameter gets a gradient.
    logits = model(torch.randn(32, 3, 32, 32))
    assert 0.05 < logits.std() < 20
    torch.nn.functional.cross_entropy(logits, torch.arange(32) % 10).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_learns_four_images(name):
    torch.manual_seed(0)
    model = build(name).train()
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_published_size_of_resnet20():
    # 0.27 M parameters (He et al. 2016, table 6) and 2,560 + 2 * 96 of the type B shortcuts.
    assert sum(p.numel() for p in build("resnet20", 3, 10, 32).parameters()) == 272474


def test_vgg_small_is_light():
    model, operations = build("vgg_small", image_size=28), 0

    def count(layer, inputs, output):
        nonlocal operations
        operations += output[0].numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 1, 28, 28).expand(2, -1, -1, -1))
    assert operations < 13e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet"}, r"unknown model 'resnet' \(did you mean 'resnet20'\?\); known: lenet"),
        ({"name": "xyz"}, r"unknown model 'xyz'; known"),
        ({"image_size": 7}, r"image_size must be \(H, W\), both at least 8, got 7"),
        ({"image_size": (28, 4)}, r"image_size .* got \(28, 4\)"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_errors(change, message):
    arguments = {"name": "lenet", "in_channels": 1, "num_classes": 10, "image_size": 28}
    with pytest.raises(ValueError, match=message):
        models.build(**(arguments | change))
