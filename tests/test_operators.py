"""The table of integer kernels against ONNX Runtime, and the warnings that follow from it."""

import warnings

import pytest
import torch
from testing import randn
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.export import export_onnx, placements
from divqat.quantize.operators import INTEGER, KINDS, TRANSPOSED

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Product(nn.Module):
    """A function of the input and a weight."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(randn(*shape) / 3)

    def forward(self, x):
        return self.function(x, self.weight)


def network(kind):
    """A network with a layer of this kind in the middle, called ``1``, and an input."""
    if kind in ("linear", "matmul"):
        layer = nn.Linear(8, 8) if kind == "linear" else Product(torch.matmul, 8, 8)
        return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)), randn(4, 6)
    d = int(kind[-2])
    layer = (TRANSPOSES if kind in TRANSPOSED else CONVS)[d](8, 8, 3)
    net = nn.Sequential(CONVS[d](3, 8, 3, padding=1), layer, nn.ReLU(), CONVS[d](8, 3, 1))
    return net, randn(4, 3, *[9] * d)


def warned(caught):
    return [
        line for w in caught if "in float" in str(w.message) for line in str(w.message).split("\n")
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["x86", "qnnpack"])
def test_the_table_is_what_onnx_runtime_does(preset, kind, tmp_path):
    net, x = network(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = divqat.prepare(net, preset, x)
    model(x)
    export_onnx(model.eval(), x, tmp_path / "model.onnx")
    layers = placements(tmp_path / "model.onnx")
    integer = kind in INTEGER["ONNX Runtime"]
    assert [layer.int8 for layer in layers] == [True, integer, True]
    assert any("no integer kernel" in line for line in warned(caught)) != integer
    if integer:
        divqat.prepare(net, preset, x, strict=True)
    else:
        with pytest.raises(ValueError, match=r"strict: .*\n.*no integer kernel"):
            divqat.prepare(net, preset, x, strict=True)


def test_a_layer_in_skip_is_no_warning():
    net, x = network("conv_transpose2d")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        divqat.prepare(net, divqat.QuantConfig(skip=("1",)), x)
        divqat.prepare(net, "tensorrt", x)
    assert not warned(caught)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (torch.mm, (6, 6)),
        (lambda x, w: torch.addmm(w[0], x, w), (6, 6)),
        (lambda x, w: x.mm(w), (6, 6)),
    ],
)
def test_products_in_any_spelling_are_layers(function, shape):
    net, x = nn.Sequential(Product(function, *shape), nn.Linear(6, 3)), randn(4, 6)
    assert len(list(net.parameters())) == 3
    model = divqat.prepare(net, "x86", x, strict=True)
    layers = [row.layer for row in divqat.summary(model).rows if row.kind == "weight"]
    assert len(layers) == 2


class Dynamic(nn.Module):
    """A convolution whose weight depends on the input, as in CondConv."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Conv2d(3, 4, 3), nn.Parameter(randn(2, 4 * 4 * 9))

    def forward(self, x):
        x = self.first(x)
        weight = (x.mean((2, 3)).mean(0)[:2] @ self.experts).view(4, 4, 3, 3)
        return F.conv2d(x, weight)


@pytest.mark.parametrize(
    ("net", "shape", "reason"),
    [
        (Dynamic(), (2, 3, 9, 9), r"\(conv2d\): its weight depends on the input"),
        (Product(lambda x, w: w @ x, 6, 4), (4, 6), r"\(matmul\): write it as F.linear"),
        (Product(lambda x, w: x[:, None] @ w, 4, 6, 6), (4, 6), r"\(matmul\): write it as"),
        (Product(lambda x, w: torch.bmm(x[None], w), 1, 6, 6), (4, 6), r"\(bmm\): write it as"),
        (Product(lambda x, w: torch.einsum("ni,ij->nj", x, w), 6, 6), (4, 6), r"\(einsum\)"),
        (Product(lambda x, w: torch.addmm(x, x, w, beta=2), 6, 6), (4, 6), r"\(addmm\)"),
    ],
)
def test_a_product_that_stays_in_float_is_named(net, shape, reason):
    size = net(randn(*shape)).shape[-1]
    whole = nn.Sequential(net, nn.Linear(size, 3))
    with pytest.warns(UserWarning, match=reason):
        divqat.prepare(whole, "x86", randn(*shape))
