// XLA's thread pool as a Parallel.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace dlm {

// The handler may itself run on a thread of the pool, so it must never wait for work that only the pool could start: it takes
// tiles from the same counter as the scheduled tasks, and waits only for tiles that some thread is already working on.
class XlaParallel final : public Parallel {
 public:
  explicit XlaParallel(xla::ffi::ThreadPool& pool) : pool_(pool) {}

  void run(int64_t tiles, void (*tile)(void*, int64_t), void* context) const override {
    // A task may start after the last tile is done and this frame is gone; it then finds the counter spent and leaves.
    auto work = std::make_shared<Work>(tiles, tile, context);
    const int64_t helpers = std::min(tiles, pool_.num_threads()) - 1;
    try {
      for (int64_t i = 0; i < helpers; ++i) pool_.Schedule([work] { work->take(); });
    } catch (const std::exception&) {
      // No memory for a task: fewer threads then, but this frame must not go while others have its context.
    }
    work->take();
    for (int64_t done = work->done.load(); done < tiles; done = work->done.load()) work->done.wait(done);
    if (work->error != nullptr) std::rethrow_exception(work->error);
  }

  int64_t threads() const override { return pool_.num_threads(); }

 private:
  struct Work {
    Work(int64_t tiles, void (*tile)(void*, int64_t), void* context) : tiles(tiles), tile(tile), context(context) {}

    void take() {
      for (int64_t index = next.fetch_add(1); index < tiles; index = next.fetch_add(1)) {
        try {
          // An exception that left a task would end the process. After one the other tiles are only counted.
          if (!failed.load()) tile(context, index);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
        if (done.fetch_add(1) + 1 == tiles) done.notify_all();
      }
    }

    const int64_t tiles;
    void (*const tile)(void*, int64_t);
    void* const context;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // the first; written before its tile counts as done
  };

  xla::ffi::ThreadPool& pool_;
};

}  // namespace dlm
