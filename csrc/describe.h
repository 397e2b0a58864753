// Describes, as text, everything on which Python and C++ must agree: names in their order, structures field by field,
// constants. sipo_kernels/backends/library.py makes the same text from its own definitions and compares.
#pragma once
#include <cstddef>
#include <cstdio>
#include <string>
#include <type_traits>

#include "elements.h"
#include "report.h"

#define SIPO_API extern "C" __attribute__((visibility("default")))

namespace sipo {
namespace {

// In place of std::to_string, which would export a symbol of the C++ library from ours.
inline std::string decimal(size_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "%zu", value);
  return text;
}

// One field: name@offset:kind and size, where the kind is pointer, floating point, integer or structure.
template <class T> std::string describe_field(const char* name, size_t offset) {
  const char* kind =
      std::is_pointer_v<T> ? ":p" : std::is_floating_point_v<T> ? ":f" : std::is_integral_v<T> ? ":i" : ":s";
  return std::string(" ") + name + "@" + decimal(offset) + kind + decimal(sizeof(T));
}
#define SIPO_FIELD(type, name) +describe_field<type>(#name, offsetof(Described, name))

// One line about a structure, from the list that it is made from.
#define SIPO_DESCRIBE(label, structure, list)                                                  \
  [] {                                                                                         \
    using Described = structure;                                                               \
    return label ":" list(SIPO_FIELD) + " =" + decimal(sizeof(structure)) + "\n";              \
  }()

#define SIPO_NAME(constant, name) name ","

// What the CPU part and the CUDA part have in common, and constants of one of them: whole lines.
inline std::string describe_shared(const std::string& constants = "") {
  return "methods: " SIPO_METHODS(SIPO_NAME) "\nratios: " SIPO_RATIOS(SIPO_NAME) "\nloss types: "
         SIPO_LOSS_TYPES(SIPO_NAME) "\nsample rows: " SIPO_SAMPLE_ROWS(SIPO_NAME) "\nmetrics: "
         SIPO_METRICS(SIPO_NAME) "\nstatistics: " SIPO_STATISTICS(SIPO_NAME) "\nelement types: "
         SIPO_DTYPES(SIPO_NAME) "\n" + constants + SIPO_DESCRIBE("settings", Settings, SIPO_SETTINGS);
}

}  // namespace
}  // namespace sipo
