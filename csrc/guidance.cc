// Guidance mixing: streams of logits combined element by element.
#include "guidance.h"

#include <algorithm>

#include "fill.h"
#include "kernels.h"

namespace dlm::DLM_ISA {
namespace {

// Columns of a row that one tile writes: a vocabulary has several such tiles, so that threads share even one row.
constexpr int64_t kColumns = 16384;

// Calls body(row, first, n) for every piece [first, first + n) of every row.
template <typename Body>
void for_pieces(int64_t rows, int64_t columns, const Parallel& parallel, Body&& body) {
  const int64_t pieces = (columns + kColumns - 1) / kColumns;
  parallel(rows * pieces, [&](int64_t index) {
    const int64_t first = index % pieces * kColumns;
    body(index / pieces, first, std::min(kColumns, columns - first));
  });
}

template <typename T>
void mix_rows(const MixArgs& args, const Parallel& parallel) {
  const bool large = is_large(static_cast<T*>(args.out), args.r * args.v);
  for_pieces(args.r, args.v, parallel, [&](int64_t row, int64_t first, int64_t n) {
    const int64_t at = row * args.v + first;
    const T* conditional = static_cast<const T*>(args.logits[0]) + at;
    const T* unconditional = static_cast<const T*>(args.logits[1]) + at;
    T* out = static_cast<T*>(args.out) + at;
    const float scale = args.weights[row];
    // A stream of weight zero must not matter, even where it is -inf or NaN.
    if (scale == 0 || scale == 1) {
      std::copy_n(scale == 0 ? unconditional : conditional, n, out);
    } else {
      fill(out, n, large, [&](int64_t j, auto&& load) { return mix(load(conditional + j), load(unconditional + j), scale); });
    }
  });
}

template <typename T>
void combine_rows(const MixArgs& args, const Parallel& parallel) {
  const bool large = is_large(static_cast<T*>(args.out), args.r * args.v);
  for_pieces(args.r, args.v, parallel, [&](int64_t row, int64_t first, int64_t n) {
    const T* logits = static_cast<const T*>(args.logits[0]) + row * args.v + first;
    fill(static_cast<T*>(args.out) + row * args.v + first, n, large, [&](int64_t j, auto&& load) {
      F sum = F{};
      I forbidden = I{};
      for (int64_t stream = 0; stream < args.streams; ++stream) {
        const float weight = args.weights[stream * args.r + row];
        if (weight == 0) continue;
        const F x = load(logits + stream * args.r * args.v + j);
        sum += weight * x;
        forbidden |= x == -kInfinity;
      }
      return select(forbidden, splat(-kInfinity), sum);
    });
  });
}

}  // namespace

void mix_guidance(const MixArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { mix_rows<decltype(of)>(args, parallel); });
}

void combine_guidance(const MixArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { combine_rows<decltype(of)>(args, parallel); });
}

}  // namespace dlm::DLM_ISA
