"""More of `CONSTRUCTS`: attention, recurrence, inputs and outputs."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import torch
from constructs import CLASSES, SIZE, construct, conv, image
from torch import Tensor, nn
from torch.nn import functional as F

# Attention and recurrence; tokens are [N, 64, 8]


class Tokens(nn.Module):
    """A convolution, the construct on [N, 64, 8], and a linear layer."""

    def __init__(self, **modules):
        super().__init__()
        self.stem = conv(3, 8)
        for name, module in modules.items():
            self.add_module(name, module)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.middle(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


@construct(int8=4, exports=False)
class SelfAttention(Tokens):
    """PyTorch makes query, key and value by one product."""

    def __init__(self):
        super().__init__(attention=nn.MultiheadAttention(8, 2, batch_first=True))

    def middle(self, y):
        return y + self.attention(y, y, y, need_weights=False)[0]


@construct(int8=5)
class CrossAttention(Tokens):
    """Sequence first, with a mask, and with the attention's weights in use; two products make
    query, and key and value."""

    def __init__(self):
        super().__init__(attention=nn.MultiheadAttention(8, 2))
        self.register_buffer("mask", torch.ones(4, 64).tril(8).logical_not())

    def middle(self, y):
        y = y.transpose(0, 1)
        z, weights = self.attention(y[:4], y, y, attn_mask=self.mask)
        return z.transpose(0, 1) + weights.mean((1, 2))[:, None, None]


@construct(int8=6, differs=True)
class EncoderLayer(Tokens):
    def __init__(self):
        super().__init__(layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))

    def middle(self, y):
        return self.layer(y)


@construct(int8=4, exports=False)
class EinsumAttention(Tokens):
    def __init__(self):
        super().__init__(qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))

    def middle(self, y):
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, 4)).unbind(2)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / 2
        return y + self.out(torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).flatten(2))


@construct(int8=4)
class MaskedScores(Tokens):
    """Masks of -inf, a class token, positions."""

    def __init__(self):
        super().__init__(qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 65, 8))

    def middle(self, y):
        y = torch.cat((self.token.expand(y.shape[0], -1, -1), y), 1) + self.positions
        q, k, v = self.qkv(y).chunk(3, -1)
        mask = torch.full((65, 65), float("-inf")).triu(1)
        scores = q @ k.transpose(-2, -1) * 8**-0.5 + mask
        return y + self.out(scores.softmax(-1) @ v)


@construct(int8=3, exports=False)
class ScaledDotProduct(Tokens):
    def __init__(self):
        super().__init__(qkv=nn.Linear(8, 24))

    def middle(self, y):
        return F.scaled_dot_product_attention(*self.qkv(y).chunk(3, -1), is_causal=True)


@construct(int8=2)
class Recurrent(Tokens):
    """ONNX Runtime has no integer kernel for what QDQ makes of an LSTM."""

    def __init__(self):
        super().__init__(lstm=nn.LSTM(8, 8, batch_first=True))

    def middle(self, y):
        return self.lstm(y[:, :4])[0]


# Inputs and outputs


def two_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return (*image(n, seed), *image(n, seed + 7))


@construct(int8=3, inputs=two_images)
class SeveralInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = conv(3, 8), conv(3, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, a, b):
        return self.head(F.relu(self.left(a) + self.right(b)).mean((2, 3)))


@construct(int8=2, exports=False)
class DefaultArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, CLASSES)

    def forward(self, x, mask=None, *, scale=0.5):
        y = F.relu(self.stem(x))
        if mask is not None:
            y = y * mask
        return self.head(y.mean((2, 3))) * scale


class Outputs(nn.Module):
    """Two feature maps."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = conv(3, 8), conv(8, 8, stride=2)
        self.fine, self.coarse = conv(8, 4, 1), conv(8, 4, 1)

    def features(self, x):
        fine = F.relu(self.stem(x))
        return self.fine(fine), self.coarse(F.relu(self.conv(fine)))


@construct(int8=4, outputs=2)
class DictOutput(Outputs):
    def forward(self, x):
        fine, coarse = self.features(x)
        return {"fine": fine, "coarse": coarse}


Maps = namedtuple("Maps", ["fine", "coarse"])


@construct(int8=4, outputs=2, exports=False)
class NamedTupleOutput(Outputs):
    def forward(self, x):
        return Maps(*self.features(x))


@dataclass
class Detections:
    """An output of one's own."""

    fine: Tensor
    coarse: Tensor


@construct(int8=4, outputs=2)
class DataclassOutput(Outputs):
    def forward(self, x):
        return Detections(*self.features(x))


@construct(int8=4, outputs=3)
class NestedOutput(Outputs):
    """A feature pyramid, with top-down connections."""

    def forward(self, x):
        fine, coarse = self.features(x)
        up = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return [[fine + up, coarse], fine.mean((2, 3))]


@construct(int8=3, outputs=2, exports=False)
class MaximumWithIndex(Outputs):
    def __init__(self):
        super().__init__()
        del self.coarse

    def forward(self, x):
        y = self.fine(F.relu(self.conv(F.relu(self.stem(x)))))
        values, indices = torch.max(y.flatten(1), dim=1)
        return values, indices


@construct(int8=2, outputs=2)
class TopK(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        best = self.head(F.relu(self.stem(x)).amax((2, 3))).topk(2, dim=1)
        return best.values.softmax(1), best.indices


@construct(int8=2)
class NormalizedInput(nn.Module):
    """The first operation is not a layer, and the last one is a softmax."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.stem, self.head = conv(3, 8), nn.Linear(8 * (SIZE // 2) ** 2, CLASSES)

    def forward(self, x):
        y = F.relu(self.stem((x - self.mean) / 0.25))
        return F.log_softmax(self.head(F.max_pool2d(y, 2).flatten(1)), dim=1)
