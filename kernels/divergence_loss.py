"""divergence_loss: loss and gradient in one launch, 12 bytes per float32 logit. The backward scales
the gradient in a second launch, which returns at once if the factor is 1.

A program keeps rows of up to 4096 classes in registers. It reads longer rows three times, mostly
from L2: for an online softmax, the divergence and the gradient. The formulas are those of
divqat/ops/reference_loss.py. The gradient needs the number of valid targets first: for up to
MAX_REDUNDANT_COUNT targets every program counts all of them, beyond that another launch does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from divqat.kernels._divergence_loss_math import (
    divergence,
    gradient,
    load_rows,
    log_softmax,
    softmax_statistics,
)
from divqat.kernels._launch import (
    WIDE,
    block_of,
    check_same,
    check_values,
    counters,
    laid_out_as,
    launch,
    resident_programs,
)
from divqat.kernels._math import cast, compute, divide, is_last_program, log
from divqat.kernels.fake_quantize import offsets
from torch import Tensor

DIRECTIONS = {"student_teacher": 0, "teacher_student": 1, "js": 2}
CLASSES = {"all": False, "non_label": True}
MAX_REDUNDANT_COUNT = 8192
COUNT_PROGRAMS = 64  # of the launch that counts the valid targets


@triton.jit
def _count_valid(target, first, step, n, ignore_index, BLOCK: tl.constexpr):
    count = tl.full([BLOCK], 0, tl.int32)
    for start in range(first * BLOCK, n, step * BLOCK):
        i = start + tl.arange(0, BLOCK)
        label = tl.load(target + i, i < n, other=0)
        count += ((label != ignore_index) & (i < n)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit(do_not_specialize=["n"])
def _count(target, counts, n, ignore_index, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    count = _count_valid(target, program, tl.num_programs(0), n, ignore_index, BLOCK)
    tl.store(counts + program, count)


@triton.jit(do_not_specialize=["n"])
def _divergence_loss(
    logits,  # [N, C]
    teacher,  # [N, C]
    target,  # [N]
    weight,  # []
    grad_logits,  # [N, C]
    loss,  # [], like the next two
    ce_mean,
    divergence_mean,
    counts,  # [COUNT_PROGRAMS], or None
    partial,  # [programs, 2] float64
    counter,
    n,
    ignore_index,
    temperature: tl.float64,
    bound: tl.float64,
    smoothing: tl.float64,
    C: tl.constexpr,
    DIRECTION: tl.constexpr,
    NON_LABEL: tl.constexpr,
    BOUNDED: tl.constexpr,
    GUARD: tl.constexpr,
    SMOOTHED: tl.constexpr,
    OWN_SOFTMAX: tl.constexpr,  # q differs from softmax(z)
    COUNT_PROGRAMS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a power of two, at least the number of programs
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    IN_REGISTERS: tl.constexpr = BLOCK >= C  # the rows stay in registers
    if counts is None:
        count = _count_valid(target, 0, 1, n, ignore_index, 1024)
    else:
        count = tl.sum(tl.load(counts + tl.arange(0, COUNT_PROGRAMS)), 0)
    one = tl.full([1, 1], 1, A)
    inv_count = divide(one, one * count.to(A))
    inv_t = divide(one, one * tl.full([1, 1], temperature, A))
    eps, weight_value = tl.full([1], smoothing, A), tl.load(weight).to(A)
    smooth = divide(eps, tl.full([1], C, A))
    at_label = 1 - eps + smooth
    factor = weight_value * tl.full([1, 1], temperature, A)
    ce_total = tl.full([ROWS], 0, tl.float64)
    divergence_total = tl.full([ROWS], 0, tl.float64)

    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        present = row < n
        label = tl.load(target + row, present, other=ignore_index)
        valid = present & (label != ignore_index)
        known = valid & (label >= 0) & (label < C)
        label = tl.where(known, label, 0).to(tl.int32)
        begin = row.to(tl.int64) * C
        label_logit = compute(tl.load(logits + begin + label, known, other=0.0))
        ll, lab = label_logit[:, None], label[:, None]

        # 1. Softmax statistics, and whether the row is misclassified.
        low, zero = tl.full([ROWS], float("-inf"), A), tl.full([ROWS], 0, A)
        maxima, total = (low, low, low), (zero, zero, zero)
        misclassified, logit_sum = tl.full([ROWS], 0, tl.int32), zero
        columns = tl.arange(0, BLOCK)[None, :]
        if IN_REGISTERS:
            z = load_rows(logits, begin, columns, present, C)
            t = load_rows(teacher, begin, columns, present, C)
            maxima, total, misclassified, logit_sum = softmax_statistics(
                z, t, columns, lab, ll, inv_t, maxima, total, misclassified, logit_sum, C,
                NON_LABEL, GUARD, SMOOTHED, OWN_SOFTMAX,
            )  # fmt: skip
        else:
            for start in range(0, C, BLOCK):
                maxima, total, misclassified, logit_sum = softmax_statistics(
                    load_rows(logits, begin, start + columns, present, C),
                    load_rows(teacher, begin, start + columns, present, C), start + columns, lab,
                    ll, inv_t, maxima, total, misclassified, logit_sum, C, NON_LABEL, GUARD,
                    SMOOTHED, OWN_SOFTMAX,
                )  # fmt: skip
        z_log, u_log, v_log = log(total[0]), log(total[1]), log(total[2])
        # CE = − Σ_k target_k · log softmax(z)_k, target = (1 − ε) onehot + ε / C
        ce = -((label_logit - maxima[0]) - z_log)
        if SMOOTHED:
            ce = (1 - eps) * ce - (smooth * (logit_sum - C * maxima[0]) - eps * z_log)
        ce = tl.where(known, ce, float("nan"))  # a kernel cannot raise an error

        # 2. D; for JS, KL(q‖m) and KL(p‖m)
        student, other = zero, zero
        if IN_REGISTERS:
            student, other = divergence(
                log_softmax(z * inv_t, maxima[1], u_log), log_softmax(t * inv_t, maxima[2], v_log),
                (columns != lab if NON_LABEL else columns >= 0) & (columns < C), DIRECTION,
            )  # fmt: skip
        else:
            for start in range(0, C, BLOCK):
                k = start + columns
                z = load_rows(logits, begin, k, present, C)
                t = load_rows(teacher, begin, k, present, C)
                a, b = divergence(
                    log_softmax(z * inv_t, maxima[1], u_log),
                    log_softmax(t * inv_t, maxima[2], v_log),
                    (k != lab if NON_LABEL else k >= 0) & (k < C), DIRECTION,
                )  # fmt: skip
                student += a
                other += b
        d = 0.5 * (student + other) if DIRECTION == 2 else student
        # D is off if it has no class, or if guard is set and the row is misclassified.
        active = (misclassified == 0) & ((1 if NON_LABEL else 0) < C)
        d_has_grad = active
        if BOUNDED:
            most = tl.full([1], bound, A)
            d_has_grad = active & (d < most)
            d = tl.where(d > most, most, d)
        d = tl.where(active, d, 0.0)

        # 3. From L = CE − λ T² D and du/dz = 1 / T:
        # dL/dz = inv_count · (softmax(z) − target − λ T dD/du)
        d_factor = tl.where(d_has_grad[:, None], factor, 0.0)
        for start in range(0, C, BLOCK):
            k = start + columns
            if not IN_REGISTERS:
                z = load_rows(logits, begin, k, present, C)
                t = load_rows(teacher, begin, k, present, C)
            grad = gradient(
                log_softmax(z, maxima[0], z_log),
                tl.where(k == lab, at_label[:, None], smooth[:, None]),
                log_softmax(z * inv_t, maxima[1], u_log), log_softmax(t * inv_t, maxima[2], v_log),
                student[:, None], tl.where(k == lab, 0.0, d_factor) if NON_LABEL else d_factor,
                DIRECTION,
            )  # fmt: skip
            grad = tl.where(known[:, None], inv_count * grad, float("nan"))
            grad = tl.where(valid[:, None], grad, 0.0)
            out = cast(grad, grad_logits.dtype.element_ty)
            tl.store(grad_logits + begin[:, None] + k, out, present[:, None] & (k < C))
        ce_total += tl.where(valid, ce, 0.0).to(tl.float64)
        divergence_total += tl.where(valid, d, 0.0).to(tl.float64)

    # The last program adds the partial sums of all programs in a fixed order.
    program = tl.program_id(0)
    tl.store(partial + 2 * program, tl.sum(ce_total, 0))
    tl.store(partial + 2 * program + 1, tl.sum(divergence_total, 0))
    if is_last_program(counter, tl.num_programs(0)):
        p = tl.arange(0, PROGRAMS)
        there = p < tl.num_programs(0)
        ces = tl.load(partial + 2 * p, there, other=0.0, cache_modifier=".cg")
        divergences = tl.load(partial + 2 * p + 1, there, other=0.0, cache_modifier=".cg")
        samples = count.to(tl.float64)
        ce_value, d_value = tl.sum(ces, 0) / samples, tl.sum(divergences, 0) / samples
        # L = CE − λ T² D; without the term if λ = 0, even if D is infinite.
        strength = weight_value.to(tl.float64) * temperature * temperature
        penalty = tl.where(strength == 0, 0.0, strength * d_value)
        tl.store(loss, (ce_value - penalty).to(A))
        tl.store(ce_mean, ce_value.to(A))
        tl.store(divergence_mean, d_value.to(A))


def _tile_config(c: int, itemsize: int) -> dict[str, int]:
    """Rows and columns of a tile, and warps."""
    most, per_warp = (4096, 256) if itemsize <= 4 else (1024, 128)
    if c > most:  # half a tile at a time, as the loops need registers, too
        return {"ROWS": 1, "BLOCK": most // 2, "num_warps": most // per_warp}
    block = triton.next_power_of_2(max(c, 2))
    return {"ROWS": max(1, 512 // block), "BLOCK": block, "num_warps": max(4, block // per_warp)}


def _choice(name: str, value: str, choices: dict[str, int]) -> int:
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value}")
    return choices[value]


def divergence_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: Tensor,
    temperature: float,
    direction: str,
    classes: str,
    bound: float | None,
    guard: bool,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same("teacher_logits", teacher_logits, logits)
    n, c = logits.shape
    like, device = torch.empty_like(logits), logits.device
    logits, teacher_logits = logits.contiguous(), teacher_logits.contiguous()
    target = target.contiguous()
    check_values(logits, n, target=target)
    check_values(logits, 1, weight=weight)
    grad = torch.empty_like(logits)
    scalar = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, ce, divergence = (torch.empty((), dtype=scalar, device=device) for _ in range(3))
    meta = _tile_config(c, logits.element_size())
    programs = max(1, min(triton.cdiv(n, meta["ROWS"]), resident_programs(device)))
    counts = None
    if n > MAX_REDUNDANT_COUNT:
        counts = target.new_empty(COUNT_PROGRAMS)
        launch(_count, (COUNT_PROGRAMS,), device, target, counts, n, ignore_index, BLOCK=1024)
    partial = torch.empty(2 * programs, dtype=torch.float64, device=device)
    non_label = bool(_choice("classes", classes, CLASSES))
    launch(
        _divergence_loss, (programs,), device, logits, teacher_logits, target, weight, grad, loss,
        ce, divergence, counts, partial, counters(device), n, ignore_index, float(temperature),
        0.0 if bound is None else float(bound), float(label_smoothing), C=c,
        DIRECTION=_choice("direction", direction, DIRECTIONS), NON_LABEL=non_label,
        BOUNDED=bound is not None, GUARD=guard, SMOOTHED=label_smoothing > 0,
        OWN_SOFTMAX=non_label or temperature != 1, COUNT_PROGRAMS=COUNT_PROGRAMS,
        PROGRAMS=triton.next_power_of_2(resident_programs(device)), **meta,
    )  # fmt: skip
    return loss, ce, divergence, laid_out_as(grad, like)


@triton.jit
def _scale_in_place(values, factor_at, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_at)
    if factor != 1:
        i = offsets(tl.program_id(0), BLOCK, WIDE)
        scaled = compute(tl.load(values + i, i < n)) * factor
        tl.store(values + i, cast(scaled, values.dtype.element_ty), i < n)


def divergence_loss_backward(grad_logits: Tensor, grad_output: Tensor) -> None:
    n = grad_logits.numel()
    if torch.empty_like(grad_logits).stride() != grad_logits.stride():
        raise ValueError(f"grad_logits: wanted a dense tensor, got strides {grad_logits.stride()}")
    check_values(grad_logits, 1, grad_output=grad_output)
    if n > 0:
        meta = block_of(n, grad_logits.element_size())
        grid, device = (triton.cdiv(n, meta["BLOCK"]),), grad_logits.device
        launch(_scale_in_place, grid, device, grad_logits, grad_output, n, WIDE=n > WIDE, **meta)
