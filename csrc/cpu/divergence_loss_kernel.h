// One sample of divergence_loss: with u = z/T, v = t/T, q = softmax(u), p = softmax(v),
// r = log q − log p, m = (q + p)/2, s = log q − log m (divqat/ops/reference_loss.py has the table).
// The passes are maxima, exponentials, log m for JS, and gradient; a row stays in the cache between
// them. Each exponential is computed once and kept in scratch.

#include "simd_math.h"

template <class T, Direction kDirection>
class LossRow {
  using S = Register<T>;
  using reg = typename S::reg;
  using F = typename S::scalar;
  static constexpr int w = S::width;
  static constexpr bool kStudent = kDirection == Direction::kStudentTeacher;
  static constexpr bool kTeacher = kDirection == Direction::kTeacherStudent;
  static constexpr bool kJs = kDirection == Direction::kJs;
  static constexpr F kInfinity = F(__builtin_inf());
  // Sums are taken in F over at most this many classes, and in double beyond.
  static constexpr int64_t kSpan = 64 * w;

  const T *z, *t;
  T* grad;
  const int64_t classes, label;
  const LossOptions& o;
  // The classes of D: all, or those before and after the label.
  const struct Range {
    int64_t begin, end;
  } part[2];
  // exp(z − max z) for CE, exp(u − max u), exp(v − max v), and u − max u − (v − max v), which JS
  // overwrites with s; each [classes]. If T = 1, exp_z is exp_u, to be multiplied by z_scale.
  F *exp_z, *const exp_u, *const exp_v, *const ratio;
  double z_scale = 1;

  F max_z, max_u, max_v;  // max_u and max_v before the division by T
  double sum_z = 0, sum_u = 0, sum_v = 0;   // of the exponentials
  double sum_logits = 0;                    // Σ (z − max z), with label smoothing only
  double centred_label = 0, exp_label = 0;  // z − max z of the label; its exponential (non_label)
  double log_ratio = 0;                     // log Σ exp(u − max u) − log Σ exp(v − max v)
  double divergence = 0, student = 0;       // D, and KL(q‖m) for JS

  // The number of lanes in use, as a constant if it is all of them.
  struct AllLanes {
    constexpr operator int() const { return w; }
  };

  template <class U>
  static reg load(const U* p, AllLanes) {
    return S::load(p);
  }
  template <class U>
  static reg load(const U* p, int lanes) {
    return S::load(p, lanes);
  }
  template <class U>
  static void store(U* p, reg value, AllLanes) {
    S::store(p, value);
  }
  template <class U>
  static void store(U* p, reg value, int lanes) {
    S::store(p, value, lanes);
  }
  // value in the lanes in use, `other` in the rest.
  static reg masked(reg value, AllLanes, reg) { return value; }
  static reg masked(reg value, int lanes, reg other) {
    return S::select(S::from_bits((1u << lanes) - 1), value, other);
  }

  // Calls f(i, lanes) for each register of a range.
  template <class Function>
  static void for_each(int64_t begin, int64_t end, Function&& f) {
    for (; begin + w <= end; begin += w) f(begin, AllLanes());
    if (begin < end) f(begin, int(end - begin));
  }
  template <class Function>
  void for_each_span(Function&& f) const {
    for (const Range& range : part) {
      for (int64_t i = range.begin; i < range.end; i += kSpan) {
        f(i, range.end - i < kSpan ? range.end : i + kSpan);
      }
    }
  }

  // weight · value, but 0 where the weight is 0, whatever the value
  static reg weighted(reg weight, reg value) {
    const reg zero = S::set(0);
    const auto counts = S::either(S::greater(weight, zero), S::is_nan(weight));
    return S::select(counts, S::mul(weight, value), zero);
  }

  static F first_lane(reg value) {
    F lanes[w];
    S::store(lanes, value);
    return lanes[0];
  }
  static F lane(T x) { return first_lane(S::load(&x, 1)); }
  static double sum(reg value) {
    F lanes[w];
    S::store(lanes, value);
    for (int half = w / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
  static F largest(reg value) {
    F lanes[w];
    S::store(lanes, value);
    F most = lanes[0];
    for (int i = 1; i < w; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
  }

  // The maxima ignore NaN; the sums do not.
  void maxima() {
    const reg lowest = S::set(-kInfinity);
    reg u = lowest, v = lowest;
    for (const Range& range : part) {
      for_each(range.begin, range.end, [&](int64_t i, auto lanes) {
        u = S::max(masked(load(z + i, lanes), lanes, lowest), u);
        v = S::max(masked(load(t + i, lanes), lanes, lowest), v);
      });
    }
    max_u = largest(u);
    max_v = largest(v);
    const F here = lane(z[label]);
    max_z = here > max_u ? here : max_u;
  }

  void exponentials() {
    const reg zero = S::set(0), inv_t = S::set(F(1 / o.temperature));
    const reg z_offset = S::set(max_z), u_offset = S::set(max_u), v_offset = S::set(max_v);
    const bool smooth = o.label_smoothing > 0;
    const bool shared = o.temperature == 1 && max_u > -kInfinity;
    if (shared) {
      exp_z = exp_u;
      z_scale = double(first_lane(exp_of<S>(S::set(max_u - max_z))));
    }
    double expected = 0;
    for_each_span([&](int64_t begin, int64_t end) {
      reg z_sum = zero, u_sum = zero, v_sum = zero, logits = zero, mean = zero;
      for_each(begin, end, [&](int64_t i, auto lanes) {
        const reg x = load(z + i, lanes);
        const reg u = S::mul(S::sub(x, u_offset), inv_t);
        const reg v = S::mul(S::sub(load(t + i, lanes), v_offset), inv_t);
        const reg q = masked(exp_of<S>(u), lanes, zero), p = masked(exp_of<S>(v), lanes, zero);
        if (!shared) {
          const reg e = masked(exp_of<S>(S::sub(x, z_offset)), lanes, zero);
          z_sum = S::add(z_sum, e);
          store(exp_z + i, e, lanes);
        }
        if (smooth) logits = S::add(logits, masked(S::sub(x, z_offset), lanes, zero));
        u_sum = S::add(u_sum, q);
        v_sum = S::add(v_sum, p);
        store(exp_u + i, q, lanes);
        const reg r = S::sub(u, v);
        if (!kStudent) store(exp_v + i, p, lanes);
        if (!kTeacher) store(ratio + i, r, lanes);
        if (!kJs) mean = S::add(mean, weighted(kStudent ? q : p, r));
      });
      sum_u += sum(u_sum);
      sum_v += sum(v_sum);
      if (!shared) sum_z += sum(z_sum);
      if (smooth) sum_logits += sum(logits);
      if (!kJs) expected += sum(mean);
    });
    if (shared) sum_z = z_scale * sum_u;
    const F centred = lane(z[label]) - max_z;
    centred_label = double(centred);
    if (o.non_label) {
      exp_label = double(first_lane(exp_of<S>(S::set(centred))));
      sum_z += exp_label;
      sum_logits += centred_label;
    }
    log_ratio = __builtin_log(sum_u) - __builtin_log(sum_v);
    // D = Σ q r, D = −Σ p r; 0 if D has no class
    if (kStudent && sum_u != 0) divergence = expected / sum_u - log_ratio;
    if (kTeacher && sum_v != 0) divergence = log_ratio - expected / sum_v;
  }

  void jensen_shannon() {
    const reg zero = S::set(0), ln2 = S::set(F(0.69314718055994530942));
    const reg normalize = S::set(F(log_ratio));
    double q_sum = 0, p_sum = 0;
    for_each_span([&](int64_t begin, int64_t end) {
      reg of_q = zero, of_p = zero;
      for_each(begin, end, [&](int64_t i, auto lanes) {
        const reg q = load(exp_u + i, lanes), p = load(exp_v + i, lanes);
        // log m = max(log q, log p) + log1p(exp(−|r|)) − log 2, so with r = log q − log p
        // s = log q − log m = min(r, 0) − log1p(exp(−|r|)) + log 2, and log p − log m = s − r
        const reg r = S::sub(load(ratio + i, lanes), normalize);
        const reg minus = S::sub(zero, S::abs(r));
        const reg shared = S::sub(ln2, log1p_of<S>(exp_of<S>(minus)));
        const reg s = S::add(S::min(zero, r), shared);
        const reg back = S::add(S::min(zero, S::sub(zero, r)), shared);
        store(ratio + i, s, lanes);
        of_q = S::add(of_q, weighted(q, s));
        of_p = S::add(of_p, weighted(p, back));
      });
      q_sum += sum(of_q);
      p_sum += sum(of_p);
    });
    if (sum_u != 0) student = q_sum / sum_u;
    divergence = 0.5 * (student + (sum_v != 0 ? p_sum / sum_v : 0.0));
  }

  // Whether torch.argmax is the label: NaN is largest, and the first of equal logits wins.
  bool argmax_is_label() const {
    const F here = lane(z[label]);
    const reg value = S::set(here);
    const bool nan = here != here;
    uint32_t preferred = 0;
    for_each(0, label, [&](int64_t i, auto lanes) {
      const reg x = load(z + i, lanes);
      const uint32_t above = nan ? S::bits(S::is_nan(x)) : ~S::bits(S::greater(value, x));
      preferred |= above & ((1u << lanes) - 1);
    });
    if (nan) return !preferred;
    for_each(label + 1, classes, [&](int64_t i, auto lanes) {
      const reg x = load(z + i, lanes);
      const uint32_t above = S::bits(S::either(S::greater(x, value), S::is_nan(x)));
      preferred |= above & ((1u << lanes) - 1);
    });
    return !preferred;
  }

  // grad = inv_count · (softmax(z) − target) − inv_count · λ T · dD/du
  template <bool kDiverge>
  void gradient() {
    const double factor = o.weight * o.temperature * o.inv_count;
    const double smooth = o.inv_count * o.label_smoothing / double(classes);
    const double at_label = (1 - o.label_smoothing) * o.inv_count + smooth;
    const reg of_z = S::set(F(o.inv_count * z_scale / sum_z));
    const reg of_u = S::set(F((kJs ? -0.5 : -1.0) * factor / sum_u));
    const reg of_v = S::set(F(factor / sum_v));
    const reg mean = S::set(F(kJs ? student : divergence + log_ratio));
    const auto write = [&](int64_t i, auto lanes, reg target) {
      reg g = S::sub(S::mul(load(exp_z + i, lanes), of_z), target);
      if (kDiverge) {
        const reg q = load(exp_u + i, lanes);
        if (kTeacher) {  // q − p
          g = S::fma(q, of_u, S::fma(load(exp_v + i, lanes), of_v, g));
        } else {  // q (r − D), or ½ q (s − KL(q‖m)) for JS
          g = S::fma(weighted(q, S::sub(load(ratio + i, lanes), mean)), of_u, g);
        }
      }
      store(grad + i, g, lanes);
    };
    const reg elsewhere = S::set(F(smooth));
    for (const Range& range : part) {
      for_each(range.begin, range.end, [&](int64_t i, auto lanes) { write(i, lanes, elsewhere); });
    }
    if (o.non_label) {
      S::store(grad + label, S::set(F(exp_label * o.inv_count / sum_z - at_label)), 1);
    } else {
      write(label, 1, S::set(F(at_label)));
    }
  }

 public:
  LossRow(const T* z, const T* t, T* grad, int64_t classes, int64_t label, const LossOptions& o,
          double* scratch)
      : z(z), t(t), grad(grad), classes(classes), label(label), o(o),
        part{{0, o.non_label ? label : classes}, {o.non_label ? label + 1 : classes, classes}},
        exp_z(reinterpret_cast<F*>(scratch)), exp_u(exp_z + classes), exp_v(exp_u + classes),
        ratio(exp_v + classes) {}

  void run(double* ce, double* d) {
    maxima();
    exponentials();
    if (kJs) jensen_shannon();
    // CE = log Σ exp z − (1 − ε) z_label − ε mean(z)
    const double smoothing = o.label_smoothing;
    *ce = __builtin_log(sum_z) - (1 - smoothing) * centred_label;
    if (smoothing > 0) *ce -= smoothing * sum_logits / double(classes);
    const bool active = !o.guard || argmax_is_label();
    const bool bounded = o.bound < __builtin_inf() && !(divergence < o.bound);
    *d = !active ? 0.0 : divergence > o.bound ? o.bound : divergence;
    // If D has no class, its sums are 0 and must not divide.
    if (active && !bounded && o.weight != 0 && sum_u != 0) {
      gradient<true>();
    } else {
      gradient<false>();
    }
  }
};

template <class T>
static void divergence_row(const T* z, const T* t, T* grad, int64_t classes, int64_t label,
                           const LossOptions& o, double* scratch, double* ce, double* divergence) {
  const auto run = [&](auto row) { row.run(ce, divergence); };
  if (o.direction == Direction::kStudentTeacher) {
    run(LossRow<T, Direction::kStudentTeacher>(z, t, grad, classes, label, o, scratch));
  } else if (o.direction == Direction::kTeacherStudent) {
    run(LossRow<T, Direction::kTeacherStudent>(z, t, grad, classes, label, o, scratch));
  } else {
    run(LossRow<T, Direction::kJs>(z, t, grad, classes, label, o, scratch));
  }
}
