"""Multi-head attention as operations that prepare knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def can_decompose(module: nn.MultiheadAttention) -> bool:
    """Whether :func:`attention` computes what a module does."""
    return module.bias_k is None and module.bias_v is None and not module.add_zero_attn


def attention(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """The forward of ``nn.MultiheadAttention`` with its linear layers as functions.

    ``is_causal`` only promises that ``attn_mask`` is a causal one. Shapes, arguments and result:
    see ``nn.MultiheadAttention``.
    """
    batched, same = query.dim() == 3, query is key and key is value
    q, k, v = _projections(module, query, key, value, same)
    if not batched:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    elif not module.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    heads, width = module.num_heads, module.head_dim
    q, k, v = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v))
    mask = _mask(q, attn_mask, key_padding_mask, heads, batched)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = (q * width**-0.5) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        shares = F.dropout(F.softmax(scores, dim=-1), module.dropout, module.training)
        result = shares @ v
        weights = shares.mean(1) if average_attn_weights else shares
    else:
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # [L, N, E], in whose order of values the module's caller drops some
    result = module.out_proj(result.permute(2, 0, 1, 3).flatten(-2))
    if not batched:
        result = result.squeeze(1)
        weights = None if weights is None else weights.squeeze(0)
    elif module.batch_first:
        result = result.transpose(0, 1)
    return result, weights


def _projections(
    module: nn.MultiheadAttention, query: Any, key: Any, value: Any, same: bool
) -> Any:
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim:
        if same:
            return F.linear(query, module.in_proj_weight, bias).chunk(3, dim=-1)
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(map(F.linear, (query, key, value), weights, biases))


def _mask(q: Any, attn_mask: Any, key_padding_mask: Any, heads: int, batched: bool) -> Any:
    """What is added to the scores, [N or 1, heads or 1, L or 1, S]; None for nothing."""
    mask = None
    if attn_mask is not None:
        mask = _additive(q, attn_mask)
        mask = mask.unflatten(0, (-1, heads)) if attn_mask.dim() == 3 else mask[None, None]
    if key_padding_mask is not None:
        padding = _additive(q, key_padding_mask)
        padding = padding[:, None, None, :] if batched else padding[None, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(q: Any, mask: Any) -> Any:
    """A mask in float: −Inf where a boolean one is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
