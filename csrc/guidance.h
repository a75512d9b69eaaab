// Classifier-free guidance of one vector of logits.
#pragma once

#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

// unconditional + scale * (conditional - unconditional); -inf where either is -inf, which the arithmetic would turn into NaN.
inline F mix(F conditional, F unconditional, float scale) {
  const F mixed = unconditional + scale * (conditional - unconditional);
  return select((conditional == -kInfinity) | (unconditional == -kInfinity), splat(-kInfinity), mixed);
}

}  // namespace
}  // namespace dlm::DLM_ISA
