// What is known of some of a row's logits. Parts merge in the order of their columns.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace dlm::DLM_ISA {
namespace {

struct Statistics {
  float top = -kInfinity;       // the greatest logit
  float second = -kInfinity;    // the greatest but one; equal to top on a tie. Only kept for margins
  int32_t token = 0;            // lowest column of top
  int32_t sampled = 0;          // lowest column of the greatest sampled_score
  float sampled_score = -kInfinity;
  float sampled_logit = -kInfinity;
  double total = 0;             // sum of exp(logit - top)
  double moment = 0;            // sum of (logit - top) * exp(logit - top)

  // Moves the sums to a new top.
  void rebase(float to) {
    if (to == top) return;
    const double shift = (double)top - to, factor = std::exp(shift);
    // From -inf the sums are 0, and 0 * -inf would be NaN.
    moment = top == -kInfinity ? 0 : (moment + shift * total) * factor;
    total *= factor;
    top = to;
  }

  // Adds what is known of later columns.
  void merge(Statistics later) {
    second = later.top > top ? std::max(top, later.second) : std::max(second, later.top);
    if (later.top > top) {
      token = later.token;
      rebase(later.top);
    } else {
      later.rebase(top);
    }
    total += later.total;
    moment += later.moment;
    if (later.sampled_score > sampled_score) {
      sampled = later.sampled;
      sampled_score = later.sampled_score;
      sampled_logit = later.sampled_logit;
    }
  }
};

}  // namespace
}  // namespace dlm::DLM_ISA
