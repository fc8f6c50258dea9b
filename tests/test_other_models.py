"""Models that are no image classifiers: vectors, several heads, noise in training, other losses."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.export import export_onnx, verify_outputs
from divqat.nn import FakeQuantize
from divqat.nn._layer import QuantLayer
from divqat.quantize.twins import twins

D, LATENT = 12, 4


def mlp(*sizes):
    layers = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """A variational autoencoder with a detector on its latent vector."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(mlp(D, 16, 16), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(16, LATENT), nn.Linear(16, LATENT)
        self.decoder, self.detector = mlp(LATENT, 16, D), mlp(LATENT, 8, 2)

    def forward(self, x):
        h = self.body(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean
        if self.training:  # z = μ + σ · ε
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.detector(z), self.decoder(z), mean, log_variance


class FunctionalVAE(VAE):
    """The same with functions between the layers, and a result by names."""

    def forward(self, x):
        h = self.body(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        noise = torch.exp(log_variance / 2) * torch.randn(mean.shape) if self.training else 0.0
        z = mean + noise if self.training else mean
        z = F.relu(self.decoder[0](z))
        return {"x": self.decoder[2](z), "mean": mean, "log_variance": log_variance}


class ConvVAE(nn.Module):
    """Signals or pictures: convolutions down and up again."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(16, LATENT), nn.Linear(16, LATENT)
        self.up = nn.Sequential(
            nn.Linear(LATENT, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)),
            nn.Upsample(scale_factor=2), nn.Conv2d(4, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        h = self.down(x.view(-1, 1, 4, 4))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.up(z), mean, log_variance


class Heads(nn.Module):
    """Two tasks on one body; dropout, a skip connection and an activation that is no ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, 16), nn.Linear(16, 16)
        self.value, self.kind, self.drop = nn.Linear(16, 1), nn.Linear(16, 5), nn.Dropout(0.1)

    def forward(self, x):
        h = F.silu(self.first(x))
        h = h + self.drop(F.relu(self.second(h)))
        return self.value(h).squeeze(1), self.kind(h)


class MeanVariance(nn.Module):
    """Regression with an uncertainty, of two inputs."""

    def __init__(self):
        super().__init__()
        self.body = mlp(2 * D, 16, 16)
        self.mean, self.log_variance = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x, y):
        h = self.body(torch.cat([x, y], 1)).relu()
        return self.mean(h), self.log_variance(h).clamp(-5, 5)


NETWORKS = {
    "mlp": (lambda: mlp(D, 16, 3), D), "vae": (VAE, D), "functional": (FunctionalVAE, D),
    "conv": (ConvVAE, 16), "heads": (Heads, D), "mean-variance": (MeanVariance, D),
}  # fmt: skip


def leaves(answer):
    if isinstance(answer, torch.Tensor):
        return [answer]
    return list(answer.values() if isinstance(answer, dict) else answer)


def inputs_of(name):
    x = torch.randn(64, NETWORKS[name][1], generator=torch.Generator().manual_seed(0))
    return (x, x.flip(0)) if name == "mean-variance" else (x,)


@pytest.mark.parametrize(("name", "bits"), [*((name, 7) for name in NETWORKS), ("vae", 3)])
def test_trained_and_exported_they_answer_the_same(name, bits, tmp_path):
    torch.manual_seed(0)
    inputs = inputs_of(name)
    model = divqat.prepare(
        NETWORKS[name][0](), divqat.preset("x86", weight_bits=bits), inputs, strict=True
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = sum((y - inputs[0].mean()).square().mean() for y in leaves(model(*inputs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantize)]
    assert all(q.calibrated for q in quantizers)
    export_onnx(model.eval(), inputs, tmp_path / "model.onnx")
    found = verify_outputs(model, tmp_path / "model.onnx", inputs, precise=True)
    assert len(found) == len(leaves(model(*inputs)))
    # a step of the grid of an activation: a kernel may round it to the other side
    assert max(found.values()) < 0.05


@pytest.mark.parametrize("network", [VAE, FunctionalVAE])
def test_noise_stays_in_float_and_only_in_training(network):
    torch.manual_seed(0)
    x = torch.randn(500, D)
    model = divqat.prepare(network(), "x86", x)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantize, QuantLayer)):
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.setdefault(name, []).append(args[0])
            )
    model(x)
    trained = seen.copy()
    seen.clear()
    model.eval()
    answer, evaluated = leaves(model(x)), {name: calls[:] for name, calls in seen.items()}
    assert all(torch.equal(a, b) for a, b in zip(answer, leaves(model(x)), strict=True))  # no noise
    # Both modes quantize the same values with the same quantizers.
    assert trained.keys() == evaluated.keys()
    assert all(len(calls) == 1 for calls in [*trained.values(), *evaluated.values()])
    # What the decoder reads has a grid in eval mode, and noise on top of it in training.
    grid = evaluated["decoder.0"][0].unique().numel()
    assert grid <= 256 < trained["decoder.0"][0].unique().numel()


def test_ptq_needs_no_noise_and_float_weights_load(tmp_path):
    torch.manual_seed(1)
    (x,) = inputs_of("vae")
    net = VAE().eval()
    model = divqat.prepare(net, "x86", x)
    model.load_state_dict(net.state_dict())
    divqat.ptq(model, [x], activation_ranges="mse", bias_correction=True, equalize=True)
    with torch.no_grad():
        for got, wanted in zip(model.eval()(x), net(x), strict=True):
            assert (got - wanted).square().mean() < 1e-3 * wanted.square().mean()


def test_a_layer_that_training_calls_once_more_has_no_twin():
    class Uneven(VAE):
        def forward(self, x):
            h = self.body(x)
            mean = self.mean(h)
            if self.training:
                return self.detector(mean + 1), self.detector(mean * torch.rand_like(mean))
            return self.detector(mean)

    (x,) = inputs_of("vae")
    model = divqat.prepare(Uneven(), "x86", x)
    assert twins(model) == {}
    model(x)


def test_verify_outputs_sees_another_file(tmp_path):
    torch.manual_seed(0)
    (x,) = inputs_of("mlp")
    a, b = (divqat.ptq(divqat.prepare(mlp(D, 16, 3), "x86", x), [x]) for _ in range(2))
    export_onnx(a, x, tmp_path / "a.onnx")
    assert verify_outputs(a, tmp_path / "a.onnx", x)["logits"] < 0.02
    assert verify_outputs(b, tmp_path / "a.onnx", x)["logits"] > 0.1
    wide = divqat.ptq(divqat.prepare(mlp(D, 16, 4), "x86", x), [x])
    with pytest.raises(ValueError, match=r"path: wanted an output logits of \[64, 4\], got"):
        verify_outputs(wide, tmp_path / "a.onnx", x)
    with pytest.raises(FileNotFoundError):
        verify_outputs(a, tmp_path / "b.onnx", x)
