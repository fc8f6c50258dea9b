// The rows of divergence_loss: logits in registers or memory, read and written in 16-byte packs.
#pragma once
#include <string.h>

#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {

// A row as packs that are aligned to 16 bytes in the whole matrix: a row of any length is read and
// written in full packs, except at its two ends. Elements that belong to a neighbouring row read as
// -inf, a class of probability 0, which the passes need not test for. Each thread keeps kPacks
// packs in registers; if kPacks is 0, every pass loads the row again.
template <class T, int kGroup, int kPacks>
class LossRow {
 public:
  using A = compute_t<T>;
  static constexpr int W = kWidth<T>, kThreads = kGroup;

  __device__ LossRow(const T* logits, const T* teacher, T* grad, int64_t index, int classes,
                     bool present, bool aligned)
      : classes_(classes), aligned_(aligned) {
    const int64_t begin = index * classes;
    start_ = -int(begin % W);
    packs_ = present ? int(ceil_div(classes - start_, W)) : 0;
    logits_ = logits + begin;
    teacher_ = teacher + begin;
    grad_ = grad + begin;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      z_[i] = load(logits_, thread() + i * kGroup);
      t_[i] = load(teacher_, thread() + i * kGroup);
    }
  }

  __device__ int classes() const { return classes_; }
  __device__ A logit(int column) const { return to_compute(logits_[column]); }

  // Calls f(column, logit, teacher logit) for this thread's elements. The column of an element of a
  // neighbouring row is outside of [0, classes).
  template <class F>
  __device__ void each(F&& f) const {
    each_pack([&](int pack, const Pack<T, W>& z, const Pack<T, W>& t) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        f(start_ + pack * W + w, to_compute(z.at[w]), to_compute(t.at[w]));
      }
    });
  }

  // gradient ← f(column, logit, teacher logit)
  template <class F>
  __device__ void store_each(F&& f) const {
    each_pack([&](int pack, const Pack<T, W>& z, const Pack<T, W>& t) {
      const int column = start_ + pack * W;
      Pack<T, W> result;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        result.at[w] = from_compute<T>(f(column + w, to_compute(z.at[w]), to_compute(t.at[w])));
      }
      if (whole(column)) {
        // Stored as one word: otherwise the compiler merges this store with the scalar ones below.
        uint4 word;
        memcpy(&word, &result, sizeof(word));
        __stcg(reinterpret_cast<uint4*>(grad_ + column), word);
        return;
      }
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if (inside(column + w)) grad_[column + w] = result.at[w];
      }
    });
  }

  __device__ bool inside(int column) const { return column >= 0 && column < classes_; }

 private:
  __device__ static int thread() { return int(threadIdx.x) % kGroup; }

  __device__ bool whole(int column) const {
    return aligned_ && column >= 0 && column + W <= classes_;
  }

  __device__ Pack<T, W> load(const T* row, int pack) const {
    const int column = start_ + pack * W;
    if (pack < packs_ && whole(column)) {
      return *reinterpret_cast<const Pack<T, W>*>(row + column);
    }
    Pack<T, W> result;
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const bool mine = pack < packs_ && inside(column + w);
      result.at[w] = mine ? row[column + w] : from_compute<T>(-A(INFINITY));
    }
    return result;
  }

  template <class F>
  __device__ void each_pack(F&& f) const {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (i * kGroup < packs_) f(thread() + i * kGroup, z_[i], t_[i]);
      }
    } else {
#pragma unroll(sizeof(T) == 8 ? 1 : 2)
      for (int pack = thread(); pack < packs_; pack += kGroup) {
        f(pack, load(logits_, pack), load(teacher_, pack));
      }
    }
  }

  const T* logits_;
  const T* teacher_;
  T* grad_;
  int classes_, start_, packs_;  // start_: column of the first element of the first pack, <= 0
  bool aligned_;
  Pack<T, W> z_[kPacks > 0 ? kPacks : 1], t_[kPacks > 0 ? kPacks : 1];
};

}  // namespace divqat::cuda
