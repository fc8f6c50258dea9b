// The rows of divergence_loss: logits in registers or memory, read and written in 16-byte packs.
#pragma once
#include <string.h>

#include "math.cuh"
#include "pack.cuh"

namespace divqat::cuda {

// A row in packs of 16 bytes on the grid of the whole matrix, so that rows of any length are read
// and written in aligned packs but for their two ends. Elements of a pack that belong to the
// neighbours read as -inf: classes without probability, in no need of a test. kPacks per thread
// are kept in registers; with 0, every pass reads the row again.
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

  // f(column, logit, teacher logit) for this thread's elements; the column is outside of
  // [0, classes) for those of a neighbour.
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
        // As one word: the compiler would share the stores of the two branches, one by one.
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
  int classes_, start_, packs_;  // start_: column of the first pack's first element, <= 0
  bool aligned_;
  Pack<T, W> z_[kPacks > 0 ? kPacks : 1], t_[kPacks > 0 ? kPacks : 1];
};

}  // namespace divqat::cuda
