// What is known of some of a row's logits. Parts merge in the order of their columns.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

struct Statistics {
  float greatest = -kInfinity;  // logit
  float second = -kInfinity;    // the greatest but one; equal to greatest on a tie. Only kept for margins
  int32_t token = 0;            // lowest column of the greatest
  int32_t sampled = 0;          // lowest column of the greatest sampled_score
  float sampled_score = -kInfinity;
  float sampled_logit = -kInfinity;
  double total = 0;             // sum of exp(logit - greatest)
  double weighted = 0;          // sum of (logit - greatest) * exp(logit - greatest)

  // Moves the sums to a new greatest logit.
  void rebase(float to) {
    if (to == greatest) return;
    const double shift = (double)greatest - to, factor = std::exp(shift);
    // From -inf the sums are 0, and 0 * -inf would be NaN.
    weighted = greatest == -kInfinity ? 0 : (weighted + shift * total) * factor;
    total *= factor;
    greatest = to;
  }

  // Adds what is known of later columns.
  void merge(Statistics later) {
    second = later.greatest > greatest ? std::max(greatest, later.second) : std::max(second, later.greatest);
    if (later.greatest > greatest) {
      token = later.token;
      rebase(later.greatest);
    } else {
      later.rebase(greatest);
    }
    total += later.total;
    weighted += later.weighted;
    if (later.sampled_score > sampled_score) {
      sampled = later.sampled;
      sampled_score = later.sampled_score;
      sampled_logit = later.sampled_logit;
    }
  }
};

}  // namespace
}  // namespace dlm::DLM_ISA
