// The arithmetic of one pair (docs/math.md §3 to §6) in double, for CPU and CUDA.
// sipo_kernels/backends/eager.py has the same formulas in plain torch.
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define SIPO_HD __host__ __device__ inline
#else
#define SIPO_HD inline
#endif

namespace sipo {

// METHODS, RATIOS and LOSS_TYPES of sipo_kernels/options.py, in the same order.
#define SIPO_METHODS(X) X(kDiffusionDpo, "diffusion_dpo") X(kDpoCm, "dpo_cm") X(kSipo, "sipo") X(kSdpo, "sdpo")
#define SIPO_RATIOS(X) X(kPosterior, "posterior") X(kReference, "reference")
#define SIPO_LOSS_TYPES(X) X(kSigmoid, "sigmoid") X(kIpo, "ipo") X(kHinge, "hinge") X(kDmpo, "dmpo")
#define SIPO_CONSTANT(constant, name) constant,
enum Method : int { SIPO_METHODS(SIPO_CONSTANT) };
enum Ratio : int { SIPO_RATIOS(SIPO_CONSTANT) };
enum LossType : int { SIPO_LOSS_TYPES(SIPO_CONSTANT) };

// A structure that Python fills in is made from the list of its fields, X(type, name), which describe.h reads too.
#define SIPO_DECLARE(type, name) type name;

#define SIPO_SETTINGS(X) \
  X(double, beta) \
  X(double, clip_min) /* 1 − clip_low */ X(double, clip_max) /* 1 + clip_high */ \
  X(double, mask_threshold) /* 0: no mask */ \
  X(double, loss_scale) /* 1/B for the mean, else 1 */ \
  X(double, smoothing) /* ε of the loss type */ \
  X(double, log_label) /* log(1 − ε) */ X(double, log_other) /* log ε */ \
  X(double, safeguard) /* μ; negative: off */ \
  X(int, method) X(int, ratio) X(int, loss_type) X(int, skip_nonfinite) \
  X(int, double_stats) /* whether results are returned as double, else as float */
struct Settings { SIPO_SETTINGS(SIPO_DECLARE) };

struct Sample {  // in: errors, scale and weight of one sample; out: the rest
  double model_error, ref_error, error_gap;
  double ratio_scale, error_weight;
  double elements;  // Σw (§2); without a mask D
  double log_ratio, ratio, weight, reward, coef;
};

struct Pair {
  double logits, loss;  // loss before the reduction
  bool mask, finite;
};

// §3. An infinite scale is the terminal step: −inf by definition, also at error 0; NaN stays NaN.
SIPO_HD double log_ratio(double scale, double error) {
  if (scale > 0 && scale - scale != 0 && error == error) return -scale;  // is inf
  return -scale * error;
}

// NaN passes through both, as it does through torch.clamp and torch.minimum.
SIPO_HD double clip(double w, double low, double high) { return w < low ? low : (w > high ? high : w); }
SIPO_HD double smaller(double a, double b) { return (a < b || a != a) ? a : b; }

SIPO_HD bool finite(double x) { return x - x == 0; }
SIPO_HD bool finite_float(double x) { return finite(float(x)); }

struct LogitLoss {
  double loss, pull;  // ℓ(z) and −ℓ'(z)
};

// §5, §6: what the loss type makes of a logit. NaN stays NaN.
SIPO_HD LogitLoss logit_loss(double z, const Settings& s) {
  if (s.loss_type == kIpo) return {(z - 0.5) * (z - 0.5), 1.0 - 2.0 * z};
  if (s.loss_type == kHinge) return {z < 1 ? 1.0 - z : (z >= 1 ? 0.0 : z), z < 1 ? 1.0 : (z >= 1 ? 0.0 : z)};
  if (s.loss_type == kDmpo) z = clip(z, -1e3, 1e3);  // σ is 0 or 1 beyond: avoids 0 · inf
  const double e = exp(-fabs(z));
  const double tail = log1p(e), softplus = (z < 0 ? -z : (z != z ? z : 0.0)) + tail;  // of −z, as is the sigmoid
  const double sigmoid = (z >= 0 ? e : 1.0) / (1.0 + e);
  if (s.loss_type == kDmpo) {  // written so that no terms of the size of z cancel
    const double pull = sigmoid * (s.log_label - s.log_other - z);
    return {pull - s.log_label - softplus, (z >= 0 ? 1.0 : e) / (1.0 + e) * pull};
  }
  if (s.smoothing > 0)  // (1 − ε) softplus(−z) + ε softplus(z)
    return {(z < 0 ? (s.smoothing - 1.0) * z : s.smoothing * z) + tail, sigmoid - s.smoothing};
  return {softplus, sigmoid};
}

// §3, §4 of one sample. has_ratio is false if no ratio_scale was given (diffusion_dpo only).
SIPO_HD void weigh(Sample& x, const Settings& s, bool has_ratio) {
  x.log_ratio = has_ratio ? log_ratio(x.ratio_scale, s.ratio == kPosterior ? x.model_error : x.error_gap) : 0.0;
  x.ratio = exp(x.log_ratio);
  x.weight = clip(x.ratio, s.clip_min, s.clip_max);
}

// §5: the factors of a pair's gaps in the logit, error weights included, and of its loss.
struct Placement {
  double a_w, a_l, b;
};

SIPO_HD Placement place(const Sample& chosen, const Sample& rejected, const Settings& s) {
  const double pair_weight = smaller(chosen.weight, rejected.weight);
  Placement p = {1.0, 1.0, 1.0};
  if (s.method == kDpoCm) p.b = pair_weight;
  if (s.method == kSipo) p.a_w = chosen.weight, p.a_l = rejected.weight;
  if (s.method == kSdpo) p.a_w = p.a_l = pair_weight;
  p.a_w *= chosen.error_weight;
  p.a_l *= rejected.error_weight;
  return p;
}

// §6, relatives: the share of the rejected sample's gradient that is kept. `inner` is mean_D(d_w · d_l), with a mask
// Σ(w_w · d_w · w_l · d_l)/Σw_l.
SIPO_HD double rejected_share(const Sample& chosen, const Sample& rejected, const Settings& s, double inner) {
  const Placement p = place(chosen, rejected, s);
  const double aligned = p.a_w * p.a_l * inner;
  const double room = (1.0 - s.safeguard) * p.a_w * p.a_w * chosen.model_error / aligned;
  return aligned > 0 && room < 1 ? room : 1.0;
}

// Whether all that a pair's results depend on is finite in their type. `penalty` is the loss before b and the mask.
SIPO_HD bool all_finite(const Sample& chosen, const Sample& rejected, double logits, double penalty, const Settings& s) {
  const auto nothing = [&](double x) { return 0.0 * (s.double_stats ? x : float(x)); };  // 0, or NaN if x is not finite
  return nothing(chosen.model_error) + nothing(chosen.error_gap) + nothing(chosen.weight) +
             nothing(rejected.model_error) + nothing(rejected.error_gap) + nothing(rejected.weight) + nothing(logits) +
             nothing(penalty) == 0;
}

// §4 to §6 of one pair of weighed samples, whose coefficients it sets. `share` is that of the rejected sample's
// gradient, 1 without the safeguard.
SIPO_HD Pair judge(Sample& chosen, Sample& rejected, const Settings& s, double share) {
  Pair p;
  p.mask =
      s.method == kDiffusionDpo || s.mask_threshold <= 0 || smaller(chosen.ratio, rejected.ratio) >= s.mask_threshold;

  const auto [a_w, a_l, b] = place(chosen, rejected, s);  // §5
  p.logits = -0.5 * s.beta * (a_w * chosen.error_gap - a_l * rejected.error_gap);
  const LogitLoss of_logit = logit_loss(p.logits, s);
  p.loss = b * (p.mask ? 1.0 : 0.0) * of_logit.loss;
  p.finite = all_finite(chosen, rejected, p.logits, of_logit.loss, s);
  if (s.skip_nonfinite && !p.finite) {
    p.mask = false;
    p.loss = 0.0;
  }

  const double g = b * of_logit.pull * 0.5 * s.beta * s.loss_scale;  // §6
  chosen.coef = p.mask && chosen.elements != 0 ? g * a_w * (2.0 / chosen.elements) : 0.0;
  rejected.coef = p.mask && rejected.elements != 0 ? -g * share * a_l * (2.0 / rejected.elements) : 0.0;
  return p;
}

// §5: the terms of a pair's logit. Not part of judge, which is short of registers on a GPU.
SIPO_HD void set_rewards(Sample& chosen, Sample& rejected, const Settings& s) {
  const Placement p = place(chosen, rejected, s);
  chosen.reward = -0.5 * s.beta * (p.a_w * chosen.error_gap);
  rejected.reward = -0.5 * s.beta * (p.a_l * rejected.error_gap);
}

// §6: a coefficient times the upstream gradient that arrived or is expected. Both and their product are rounded to the
// type of `coef` in memory (double if `wide`), so that a gradient has the same bits whenever it is computed.
SIPO_HD double upstream_coef(double coef, double upstream, bool wide) {
  if (wide) return coef == 0 ? 0.0 : coef * upstream;
  const float c = float(coef);
  return c == 0 ? 0.0f : c * float(upstream);
}

// §3 to §6 of one pair; `inner` is read with the safeguard alone.
SIPO_HD Pair pair_math(Sample& chosen, Sample& rejected, const Settings& s, bool has_ratio, double inner) {
  weigh(chosen, s, has_ratio);
  weigh(rejected, s, has_ratio);
  set_rewards(chosen, rejected, s);
  return judge(chosen, rejected, s, s.safeguard < 0 ? 1.0 : rejected_share(chosen, rejected, s, inner));
}

}  // namespace sipo
