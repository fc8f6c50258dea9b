"""The formulas of divergence_loss on a tile [R, B]; see divqat/ops/reference_loss.py."""

import triton
import triton.language as tl
from divqat.kernels._math import compute, exp, log1p


@triton.jit
def online_softmax(row_max, total, x, counted):
    """Adds a tile [R, B] to the running maximum [R] and to Σ exp(x − maximum) [R]."""
    x = tl.where(counted, x, float("-inf"))
    # The maximum ignores NaN; the sum does not.
    new = tl.maximum(row_max, tl.max(tl.where(x != x, float("-inf"), x), 1))
    # While all of a row is -inf, subtract 0, as -inf − -inf is NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * exp(tl.where(total == 0, 0.0, row_max - base)) + tl.sum(
        exp(x - base[:, None]), 1
    )
    return new, total


@triton.jit
def argmax_prefers(z, k, label_logit, label):
    """Whether torch.argmax prefers class k to the label: first NaN, then the first of equals."""
    nan, label_nan = z != z, label_logit != label_logit
    larger = (z > label_logit) | ((z == label_logit) & (k < label))
    return tl.where(nan | label_nan, nan & ((label_nan == 0) | (k < label)), larger)


@triton.jit
def _log_mean(log_q, log_p):
    """log((q + p) / 2)"""
    gap = tl.where(log_q > log_p, log_p - log_q, log_q - log_p)
    larger = tl.where(log_q > log_p, log_q, log_p)
    return larger + log1p(exp(gap)) - 0.6931471805599453


@triton.jit
def weighted_sum(weight, value, counted):
    """Σ weight · value, without the terms whose weight is 0, whatever their value."""
    return tl.sum(tl.where(counted & (weight != 0), weight * value, 0.0), 1)


@triton.jit
def divergence(log_q, log_p, counted, DIRECTION: tl.constexpr):
    """D [R] of this tile, twice; for JS, KL(q‖m) and KL(p‖m)."""
    q, p = exp(log_q), exp(log_p)
    if DIRECTION == 0:
        d = weighted_sum(q, log_q - log_p, counted)
        return d, d
    elif DIRECTION == 1:
        d = weighted_sum(p, log_p - log_q, counted)
        return d, d
    else:
        log_m = _log_mean(log_q, log_p)
        return weighted_sum(q, log_q - log_m, counted), weighted_sum(p, log_p - log_m, counted)


@triton.jit
def gradient(log_prob, at_class, log_q, log_p, student, d_factor, DIRECTION: tl.constexpr):
    """softmax(z) − target − λ T dD/du, [R, B]; d_factor [R, 1] is λ T, or 0."""
    q = exp(log_q)
    if DIRECTION == 0:
        grad_u = tl.where(q == 0, 0.0, q * (log_q - log_p - student))
    elif DIRECTION == 1:
        grad_u = q - exp(log_p)
    else:
        grad_u = tl.where(q == 0, 0.0, 0.5 * q * (log_q - _log_mean(log_q, log_p) - student))
    # D may be infinite where d_factor is 0.
    return exp(log_prob) - at_class - tl.where(d_factor == 0, 0.0, d_factor * grad_u)


@triton.jit
def load_rows(logits, begin, k, present, C: tl.constexpr):
    """Logits [R, B] of the rows that begin at ``begin``; -inf, of probability 0, outside."""
    there = present[:, None] & (k < C)
    return compute(tl.load(logits + begin[:, None] + k, there, other=float("-inf")))


@triton.jit
def softmax_statistics(
    z, t, k, label, label_logit, inv_t, maxima, total, misclassified, logit_sum,
    C: tl.constexpr, NON_LABEL: tl.constexpr, GUARD: tl.constexpr, SMOOTHED: tl.constexpr,
    OWN_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the maxima and sums of exponentials of z (for CE), u = z / T (for q) and
    v = t / T (for p), to the flag of misclassified rows, and to the sum of the logits.
    """
    inside = k < C
    counted = inside & (k != label) if NON_LABEL else inside
    z_max, z_sum = online_softmax(maxima[0], total[0], z, inside)
    u_max, u_sum = (
        online_softmax(maxima[1], total[1], z * inv_t, counted) if OWN_SOFTMAX else (z_max, z_sum)
    )
    v_max, v_sum = online_softmax(maxima[2], total[2], t * inv_t, counted)
    if GUARD:
        preferred = inside & argmax_prefers(z, k, label_logit, label)
        misclassified = tl.maximum(misclassified, tl.max(preferred.to(tl.int32), 1))
    if SMOOTHED:
        logit_sum += tl.sum(tl.where(inside, z, 0.0), 1)
    return (z_max, u_max, v_max), (z_sum, u_sum, v_sum), misclassified, logit_sum


@triton.jit
def log_softmax(x, row_max, log_sum):
    return (x - row_max[:, None]) - log_sum[:, None]
