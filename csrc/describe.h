// The description of what Python and C++ must agree on: names in order, and the fields of the argument structures.
// sipo_kernels/backends/library.py makes the same text from its own definitions and compares.
#pragma once
#include <cstddef>
#include <cstdio>
#include <string>

#include "elements.h"
#include "report.h"

namespace sipo {
namespace {

// In place of std::to_string, which would export a symbol of the C++ library from ours.
inline std::string decimal(size_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "%zu", value);
  return text;
}

#define SIPO_NAME(constant, name) name ","
#define SIPO_FIELD(field) text += " " #field "@" + decimal(offsetof(Described, field)) + ":" + \
                                  decimal(sizeof(Described::field));
#define SIPO_SETTINGS_FIELDS(F) \
  F(beta) F(clip_min) F(clip_max) F(mask_threshold) F(loss_scale) F(smoothing) F(log_label) F(log_other) \
  F(safeguard) F(method) F(ratio) F(loss_type) F(skip_nonfinite) F(double_stats)

inline std::string describe_names() {
  using Described = Settings;
  std::string text = "methods " SIPO_METHODS(SIPO_NAME) "\nratios " SIPO_RATIOS(SIPO_NAME) "\nloss types "
                     SIPO_LOSS_TYPES(SIPO_NAME) "\nsample rows " SIPO_SAMPLE_ROWS(SIPO_NAME) "\nmetrics "
                     SIPO_METRICS(SIPO_NAME) "\nstatistics " SIPO_STATISTICS(SIPO_NAME) "\nelement types "
                     SIPO_DTYPES(SIPO_NAME) "\nsettings";
  SIPO_SETTINGS_FIELDS(SIPO_FIELD)
  return text + " =" + decimal(sizeof(Settings)) + "\n";
}

}  // namespace
}  // namespace sipo
