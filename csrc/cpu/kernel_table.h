// The vectorised inner loops, as a table of function pointers per element type and instruction set.
// No torch header here or in its includes: memory, threads and checks are the caller's.
#pragma once
#include <stdint.h>

#include "../divergence_loss_direction.h"
#include "element_types.h"

namespace divqat {

// Threads split a range at multiples of this: masks are written in 64-bit words.
constexpr int64_t kMaskWord = 64;
// Per-channel tables are padded by this many values, wrapping around, for full-register loads.
constexpr int64_t kMaxLanes = 16;

// How elements are quantized. Element i of the memory belongs to channel (i / inner) % channels.
struct QuantizeParams {
  const float* scale;      // [channels + kMaxLanes], as are the next two
  const float* inv_scale;  // 1 / scale
  const float* zero_point;
  int64_t channels;
  int64_t inner;
  float quant_min;
  float quant_max;
  bool per_tensor;  // one scale: float64 codes are multiplied in float32, as ATen does
  bool stream = false;  // non-temporal stores
};

// What NaN becomes, and whether a ReLU comes first (NaN stays NaN then).
enum class QuantizeMode { kPropagateNan, kLowestForNan, kRelu };

// The arguments of divergence_loss that all rows share.
struct LossOptions {
  Direction direction;
  bool non_label;  // q and p are distributions over all classes but the label
  bool guard;
  double weight;
  double temperature;
  double bound;  // infinity: none
  double label_smoothing;
  double inv_count;  // 1 / number of valid targets
};

template <class T>
struct Kernels {
  // Elements [begin, end) of x; begin is a multiple of kMaskWord. mask may be nullptr.
  void (*fake_quantize)(const T* x, T* y, uint8_t* mask, int64_t begin, int64_t end,
                        const QuantizeParams&, QuantizeMode);
  // out = grad where the mask is set, else 0.
  void (*masked_grad)(const T* grad, const uint8_t* mask, T* out, int64_t begin, int64_t end,
                      bool stream);
  // n elements of one channel: grad_x as above, and adds to sums [2] the sum of
  // grad · (level − (x/scale inside, 0 outside)), level = q − zero_point, and that of grad outside.
  void (*lsq_backward)(const T* grad, const T* x, T* grad_x, int64_t n, const QuantizeParams&,
                       int64_t channel, double* sums);
  // The same for rows of one element per channel; sums [channels, 2].
  void (*lsq_backward_columns)(const T* grad, const T* x, T* grad_x, int64_t rows,
                               const QuantizeParams&, double* sums);
  // out = grad where x [n], of one channel, is in range, else 0.
  void (*clipped_grad)(const T* x, const T* grad, T* out, int64_t n, const QuantizeParams&);
  // A copy with non-temporal stores.
  void (*copy)(const T* from, T* to, int64_t n);
  // Minimum and maximum of x [n], n > 0; both NaN if there is a NaN.
  void (*min_max)(const T* x, int64_t n, float* low, float* high);
  // The same for each column of x [rows, columns], rows > 0; low and high are [columns].
  void (*min_max_columns)(const T* x, int64_t rows, int64_t columns, float* low, float* high);
  // Cross-entropy and divergence of one sample, and the gradient of the mean loss.
  // z, t, grad [classes]; scratch [4 * classes].
  void (*divergence_row)(const T* z, const T* t, T* grad, int64_t classes, int64_t label,
                         const LossOptions&, double* scratch, double* ce, double* divergence);
};

struct InstructionSet {
  const char* name;
  bool (*runs_here)();
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bf16> b16;
  Kernels<f16> h16;
};

// nullptr if the compiler or the target does not have the instructions.
extern const InstructionSet* const kPortable;
extern const InstructionSet* const kAvx2;
extern const InstructionSet* const kAvx512;

}  // namespace divqat
