"""QuantConvBn2d against the textbook form and the deployed sum, in float64."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from testing import randn
from torch import nn
from torch.nn import functional as F

import divqat
from divqat.nn import QuantConvBn2d, QuantSpec
from divqat.nn.spec import WEIGHT

CHANNELS, EPS = 6, 1e-3
PER_TENSOR = QuantSpec(narrow_range=True)
SPECS = pytest.mark.parametrize("spec", [WEIGHT, PER_TENSOR], ids=["per channel", "per tensor"])
BIAS = pytest.mark.parametrize("bias", [False, True])
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def conv_bn(spec=WEIGHT, bias=False, **options):
    """A layer whose statistics and affine parameters are far from their initial values."""
    torch.manual_seed(0)
    layer = QuantConvBn2d(
        4, CHANNELS, 3, 2, 1, bias=bias, eps=EPS, momentum=0.2, dtype=torch.float64,
        weight_spec=spec, input_spec=None, **options,
    )  # fmt: skip
    with torch.no_grad():
        layer.bn.weight.copy_(torch.tensor([1.5, -0.7, 0.3, 2.0, -1.1, 0.9]))
        layer.bn.bias.copy_(randn(CHANNELS, seed=1))
        layer.bn.running_mean.copy_(randn(CHANNELS, seed=2))
        layer.bn.running_var.copy_(randn(CHANNELS, seed=3).square() + 0.1)
    return layer


def aten_quantize(w, spec):
    """w on its grid; the scale is a float32 constant, as torch's op takes it."""
    w_ = w.detach()
    if not spec.per_channel:
        scale = w_.abs().max().float() * 2 / (spec.quant_max - spec.quant_min)
        q = torch.fake_quantize_per_tensor_affine(
            w, float(scale), 0, spec.quant_min, spec.quant_max
        )
        return q
    scale = w_.abs().amax((1, 2, 3)).float() * 2 / (spec.quant_max - spec.quant_min)
    zero = torch.zeros(len(w), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(w, scale, zero, 0, spec.quant_min, spec.quant_max)


def parameters(layer):
    values = [layer.weight, layer.bn.weight, layer.bn.bias, layer.bias]
    return [value for value in values if value is not None]


def textbook(layer, x):
    """Jacob et al. 2018, figure C.7, in the usual form: divide the *output* by s, then BatchNorm.

    Returns the output and the statistics after it.
    """
    bn = layer.bn
    s = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach()
    weight = aten_quantize(layer.weight * s.view(-1, 1, 1, 1), layer.weight_spec)
    y = F.conv2d(x, weight, None, layer.stride, layer.padding) / s.view(1, -1, 1, 1)
    if layer.bias is not None:
        y = y + layer.bias.view(1, -1, 1, 1)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    return F.batch_norm(y, mean, var, bn.weight, bn.bias, True, bn.momentum, bn.eps), (mean, var)


def deployed(layer, x):
    """One convolution with the folded quantized weight and the folded bias."""
    bn = layer.bn
    s = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    weight = aten_quantize(layer.weight * s.view(-1, 1, 1, 1), layer.weight_spec)
    bias = bn.bias - bn.running_mean * s + (0 if layer.bias is None else layer.bias * s)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def gradients(y, layer, x):
    cotangent = randn(*y.shape, dtype=y.dtype, seed=9)
    return torch.autograd.grad((y * cotangent).sum(), [x, *parameters(layer)])


@SPECS
@BIAS
def test_training_equals_the_textbook_form(spec, bias):
    layer = conv_bn(spec, bias)
    x = randn(5, 4, 9, 9, dtype=torch.float64).requires_grad_()
    expected, (mean, var) = textbook(layer, x)
    expected_gradients = gradients(expected, layer, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(gradients(y, layer, x), expected_gradients, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.bn.running_mean, mean, **CLOSE)
    torch.testing.assert_close(layer.bn.running_var, var, **CLOSE)
    assert layer.bn.num_batches_tracked == 1


@SPECS
@BIAS
@pytest.mark.parametrize("mode", ["eval", "frozen"])
def test_eval_and_frozen_equal_the_deployed_sum(spec, bias, mode):
    layer = conv_bn(spec, bias)
    if mode == "eval":
        layer.eval()
    else:
        layer.freeze()
    statistics = [buffer.clone() for buffer in layer.bn.buffers()]
    x = randn(5, 4, 9, 9, dtype=torch.float64).requires_grad_()
    expected = deployed(layer, x)
    expected_gradients = gradients(expected, layer, x)
    y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(gradients(y, layer, x), expected_gradients, rtol=1e-9, atol=1e-9)
    for buffer, before in zip(layer.bn.buffers(), statistics, strict=True):
        assert torch.equal(buffer, before)


def test_without_quantization_error_it_is_conv_and_batchnorm():
    """Weights -1, 0, 1 lie on the grid of any row scale: the layer must be the float pair."""
    layer = conv_bn(bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape))
    conv = nn.Conv2d(4, CHANNELS, 3, 2, 1, dtype=torch.float64)
    conv.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    bn = copy.deepcopy(layer.bn)
    x = randn(5, 4, 9, 9, dtype=torch.float64)
    for mode in (True, False):
        layer.train(mode)
        bn.train(mode)
        torch.testing.assert_close(layer(x), bn(conv(x)), rtol=1e-6, atol=1e-6)  # float32 scales


def test_tiny_and_zero_gamma():
    layer = conv_bn()
    with torch.no_grad():
        layer.bn.weight[0], layer.bn.weight[1] = 0.0, 1e-9
    x = randn(5, 4, 9, 9, dtype=torch.float64)
    y = layer(x)
    (y * randn(*y.shape, dtype=y.dtype, seed=9)).sum().backward()
    torch.testing.assert_close(y[:, 0], layer.bn.bias[0].expand_as(y[:, 0]), **CLOSE)
    assert all(p.grad.isfinite().all() for p in parameters(layer))
    assert layer.bn.weight.grad[:2].abs().min() > 1e-3  # a channel switched off can come back
    layer.eval()
    y = layer(x)
    torch.testing.assert_close(y[:, 0], layer.bn.bias[0].expand_as(y[:, 0]), **CLOSE)
    # The observer's smallest scale, 1e-7, is larger than that of the weights times 1e-9.
    torch.testing.assert_close(y, deployed(layer, x), rtol=1e-10, atol=1e-8)


def test_batchnorm_put_in_eval_mode_uses_its_running_statistics():
    """As training loops freeze statistics: by ``bn.eval()`` on every BatchNorm2d."""
    layer = conv_bn()
    layer.bn.eval()
    x = randn(5, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), deployed(layer, x), **CLOSE)
    assert layer.bn.num_batches_tracked == 0


def test_learned_weight_scale_is_that_of_the_unfolded_weight():
    layer = conv_bn(replace(WEIGHT, learned=True))
    x = randn(5, 4, 9, 9, dtype=torch.float64)
    layer(x)  # sets the scales
    layer.eval()
    s = layer.bn.weight / torch.sqrt(layer.bn.running_var + EPS)
    scale = layer.weight_fake_quantize.scale.detach()
    zero = torch.zeros(CHANNELS, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(
        layer.weight, scale, zero, 0, WEIGHT.quant_min, WEIGHT.quant_max
    )
    bias = layer.bn.bias - layer.bn.running_mean * s
    expected = F.conv2d(x, weight * s.view(-1, 1, 1, 1), bias, 2, 1)
    torch.testing.assert_close(layer(x), expected, **CLOSE)
    torch.testing.assert_close(
        layer.weight_qparams(), scale * s.abs().float(), rtol=1e-6, atol=0, check_dtype=False
    )


def test_training_settles_on_the_deployed_function():
    """With a constant batch the running statistics approach the batch's: eval is training."""
    layer = conv_bn()
    x = randn(16, 4, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(120):
            trained = layer(x)
        evaluated = layer.eval()(x)
    # Left are unbiased against biased variance (n = 400) and the rounding that depends on s.
    assert (trained - evaluated).abs().max() < 0.03 * trained.abs().max()


def test_a_batchnorm_that_is_not_fused_freezes_too():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    x = randn(8, 3, 8, 8)
    model = divqat.prepare(net, "x86", x)
    model(x)
    before = model.get_submodule("2").running_mean.clone()
    for other in (
        divqat.freeze_batchnorm(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        other.train()(3 * x)
        other.eval().train()(3 * x)
        norm = other.get_submodule("2")
        assert torch.equal(norm.running_mean, before) and norm.num_batches_tracked == 1
    model.train()(x).sum().backward()
    assert model.get_submodule("2").weight.grad is not None
    divqat.convert(model)


def test_freezing_leaves_a_float_model_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert type(divqat.freeze_batchnorm(net)[1]) is nn.BatchNorm2d and net[1].training
