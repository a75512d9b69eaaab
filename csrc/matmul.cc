// A product of rows and a weight that lies as it was stored: of 16 bits nothing wider is ever in memory.
#include "kernels.h"
#include "scratch.h"
#include "weight.h"

namespace dlm::DLM_ISA {
namespace {

template <typename T>
void multiply_rows(const MatmulArgs& args, const Parallel& parallel) {
  using E = Element<T>;
  // Equal blocks: one full block and a small rest would read the weight for the rest alone.
  const int64_t blocks = (args.r + kWeightRows - 1) / kWeightRows, most = (args.r + blocks - 1) / blocks;
  // Narrower tiles where they are few, but what a tile has of a row is to be some lines.
  const int64_t width = std::clamp(round_up(args.f / (2 * parallel.threads()), kPanel), kWeightColumns / 4, kWeightColumns);
  const int64_t tiles = (args.f + width - 1) / width, a_row = weight_a_row<T>(args.d);
  const T *x = static_cast<const T*>(args.x), *weight = static_cast<const T*>(args.weight);
  parallel(blocks * tiles, [&](int64_t index) {
    const int64_t row = index / tiles * most, column = index % tiles * width;
    const int64_t count = std::min(most, args.r - row), n = std::min(width, args.f - column);
    Scratch& scratch = thread_scratch();
    scratch.reset(sizeof(E) * (count * a_row + kWeightRoom<T>) + 4 * count * width + 3 * 64);
    E *a = scratch.take<E>(count * a_row), *room = scratch.take<E>(kWeightRoom<T>);
    float* c = scratch.take<float>(count * width);
    copy_rows(x + row * args.d, args.d, count, args.d, nullptr, a, a_row);
    multiply_weight(a, a_row, count, weight + column, args.f, args.d, n, c, width, room);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < n; j += kPanel) {
        const float* from = c + i * width + j;
        store_panel(static_cast<T*>(args.out) + (row + i) * args.f + column + j, n - j, load(from), load(from + kLanes));
      }
  }, args.r * args.d * args.f);
}

}  // namespace

void matmul(const MatmulArgs& args, const Parallel& parallel) {
  with_dtype(args.dtype, [&](auto of) { multiply_rows<decltype(of)>(args, parallel); });
}

}  // namespace dlm::DLM_ISA
