// The formulas of divergence_loss for one row: four passes over its logits.
#pragma once
#include "../divergence_loss_direction.h"
#include "divergence_loss_rows.cuh"
#include "math.cuh"

namespace divqat::cuda {

template <int kGroup>
constexpr int kBlockOf = kGroup > 128 ? kGroup : 128;

template <class A>
struct RowOptions {
  A temperature, inv_temperature, bound, smoothing, weight;
  bool bounded, non_label, guard;
};

template <class A>
struct RowTerms {
  A ce, divergence;
};

// Shared memory for the three reductions of a row over a block. Each reduction has a slot of its
// own, so it needs only one barrier: before a slot is written again, every thread has passed the
// barriers of the other two.
template <class A, int kGroup>
struct ReduceBuffer {
  A at[3][kGroup > 32 ? kGroup / 32 : 1][4];
};

// Reduces kValues values over the group; every thread gets the same bits. All lanes of the warp
// must call it, and all threads of the block if the group is the block.
template <int kSlot, int kGroup, int kValues, class A, class Combine>
__device__ void group_reduce(A (&values)[kValues], ReduceBuffer<A, kGroup>& buffer,
                             Combine combine) {
#pragma unroll
  for (int offset = (kGroup < 32 ? kGroup : 32) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      values[i] = combine(values[i], __shfl_xor_sync(0xffffffffu, values[i], offset));
    }
  }
  if constexpr (kGroup > 32) {
    auto& slot = buffer.at[kSlot];
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) slot[threadIdx.x / 32][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] = slot[0][i];
    for (int warp = 1; warp < kGroup / 32; ++warp) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = combine(values[i], slot[warp][i]);
    }
  }
}

// Whether torch.argmax prefers class k, with logit z, to the label: NaN is largest, and the first
// of equal logits wins.
template <class A>
__device__ bool argmax_prefers(A z, int k, A label_logit, int label) {
  const bool nan = z != z, label_nan = label_logit != label_logit;
  if (nan || label_nan) return nan && (!label_nan || k < label);
  return z > label_logit || (z == label_logit && k < label);
}

// log((q + p) / 2) from log q and log p
template <class A>
__device__ A log_mean(A log_q, A log_p) {
  const A gap = log_q > log_p ? log_p - log_q : log_q - log_p;
  return max_of(log_q, log_p) + log1p_of(exp_of(gap)) - A(0.693147180559945309417);
}

// weight · value, but 0 where the weight is 0, whatever the value
template <class A>
__device__ A weighted(A weight, A value) {
  return weight == 0 ? A(0) : weight * value;
}

// Writes the gradient of the mean loss for the row, and returns its CE and D. A target that is not
// a class gives NaN, as a kernel cannot raise an error.
template <Direction kDirection, class Row>
__device__ RowTerms<typename Row::A> row_loss(
    const Row& row, bool valid, int64_t target, typename Row::A inv_count,
    const RowOptions<typename Row::A>& o, ReduceBuffer<typename Row::A, Row::kThreads>& buffer) {
  using A = typename Row::A;
  constexpr int kGroup = Row::kThreads;
  const A nan = A(NAN);
  const bool known = valid && target >= 0 && target < row.classes();
  const int label = known ? int(target) : 0;
  const int skipped = o.non_label ? label : -1;  // the class that D leaves out
  const A label_logit = known ? row.logit(label) : A(0);

  // 1. Maxima of the logits in D; maxima[2] is 1 if argmax is not the label.
  A maxima[3] = {-A(INFINITY), -A(INFINITY), A(0)};
  row.each([&](int k, A z, A t) {
    if (o.guard && row.inside(k) && argmax_prefers(z, k, label_logit, label)) maxima[2] = A(1);
    if (k == skipped) return;
    maxima[0] = max_of(maxima[0], z);
    maxima[1] = max_of(maxima[1], t);
  });
  group_reduce<0, kGroup>(maxima, buffer, [](A a, A b) { return max_of(a, b); });
  const A z_max = o.non_label && known ? max_of(maxima[0], label_logit) : maxima[0];
  const A u_max = maxima[0], v_max = maxima[1];

  // 2. Sums of exponentials for CE, q and p, and the sum of the logits for label smoothing.
  const bool own_softmax = o.non_label || o.temperature != 1;  // q differs from softmax(z)
  A sums[4] = {};
  row.each([&](int k, A z, A t) {
    sums[0] += exp_of(z - z_max);
    if (o.smoothing > 0 && row.inside(k)) sums[3] += z - z_max;
    if (k == skipped) return;
    if (own_softmax) sums[1] += exp_of((z - u_max) * o.inv_temperature);
    sums[2] += exp_of((t - v_max) * o.inv_temperature);
  });
  group_reduce<1, kGroup>(sums, buffer, [](A a, A b) { return a + b; });
  const A log_z = log_of(sums[0]);
  const A log_u = own_softmax ? log_of(sums[1]) : log_z;
  const A log_v = log_of(sums[2]);
  // CE = − Σ_k target_k · log softmax(z)_k, target = (1 − ε) onehot + ε / C
  RowTerms<A> terms;
  terms.ce = -((label_logit - z_max) - log_z);
  const A smooth = o.smoothing / A(row.classes());
  if (o.smoothing > 0) {
    terms.ce = (1 - o.smoothing) * terms.ce - (smooth * sums[3] - o.smoothing * log_z);
  }
  if (!known) terms.ce = nan;

  // log q = (u − max u) − log Σ exp(u − max u), and log p from v likewise
  const auto log_q_of = [&](A z) { return fma_of(z - u_max, o.inv_temperature, -log_u); };
  const auto log_p_of = [&](A t) { return fma_of(t - v_max, o.inv_temperature, -log_v); };

  // 3. D in d[0]; for JS, KL(q‖m) in d[0] and KL(p‖m) in d[1]
  A d[2] = {};
  row.each([&](int k, A z, A t) {
    if (k == skipped) return;
    const A log_q = log_q_of(z), log_p = log_p_of(t);
    if constexpr (kDirection == Direction::kStudentTeacher) {
      d[0] += weighted(exp_of(log_q), log_q - log_p);
    } else if constexpr (kDirection == Direction::kTeacherStudent) {
      d[0] += weighted(exp_of(log_p), log_p - log_q);
    } else {
      const A log_m = log_mean(log_q, log_p);
      d[0] += weighted(exp_of(log_q), log_q - log_m);
      d[1] += weighted(exp_of(log_p), log_p - log_m);
    }
  });
  group_reduce<2, kGroup>(d, buffer, [](A a, A b) { return a + b; });
  const A student = d[0];
  terms.divergence = kDirection == Direction::kJs ? A(0.5) * (d[0] + d[1]) : d[0];
  // D is off if it has no class, or if guard is set and the row is misclassified.
  const bool active = !(o.guard && maxima[2] > 0) && !(o.non_label && row.classes() == 1);
  const bool d_has_grad = active && !(o.bounded && !(terms.divergence < o.bound)) && o.weight != 0;
  if (o.bounded && terms.divergence > o.bound) terms.divergence = o.bound;
  if (!active) terms.divergence = A(0);

  // 4. From L = CE − λ T² D and du/dz = 1 / T:
  // dL/dz = inv_count · (softmax(z) − target − λ T dD/du)
  const A d_factor = o.weight * o.temperature, at_label = 1 - o.smoothing + smooth;
  row.store_each([&](int k, A z, A t) {
    if (!known) return valid ? nan : A(0);
    const A grad = exp_of((z - z_max) - log_z) - (k == label ? at_label : smooth);
    if (!d_has_grad || k == skipped) return inv_count * grad;
    const A log_q = log_q_of(z), log_p = log_p_of(t), q = exp_of(log_q);
    A grad_u;
    if constexpr (kDirection == Direction::kStudentTeacher) {
      grad_u = weighted(q, log_q - log_p - student);
    } else if constexpr (kDirection == Direction::kTeacherStudent) {
      grad_u = q - exp_of(log_p);
    } else {
      grad_u = weighted(A(0.5) * q, log_q - log_mean(log_q, log_p) - student);
    }
    return inv_count * (grad - d_factor * grad_u);
  });
  return terms;
}

}  // namespace divqat::cuda
