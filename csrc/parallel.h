// How a kernel spreads its tiles over threads. Abstract, for kernels must not include XLA's headers: they are compiled for several
// instruction sets, and of an inline function outside their own namespaces the linker keeps any one copy.
#pragma once

#include <cstdint>

namespace dlm {

// Calls tile(0) ... tile(tiles - 1), each once, in any order, on any thread; returns when all are done. Where one throws, the
// others may be left out, and it throws that too.
class Parallel {
 public:
  static constexpr int64_t kLeastShared = 1 << 22;  // multiply-adds, about 0.1 ms of one thread

  virtual ~Parallel() = default;
  virtual void run(int64_t tiles, void (*tile)(void* context, int64_t index), void* context) const = 0;
  virtual int64_t threads() const = 0;

  // work: of all tiles together, in multiply-adds. Little work stays on the calling thread: waking another takes as long.
  template <typename Tile>
  void operator()(int64_t tiles, Tile&& tile, int64_t work = kLeastShared) const {
    if (work < kLeastShared) {
      for (int64_t index = 0; index < tiles; ++index) tile(index);
      return;
    }
    run(tiles, [](void* context, int64_t index) { (*static_cast<Tile*>(context))(index); }, &tile);
  }
};

}  // namespace dlm
