// Memory that a thread keeps between tiles.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace dlm {

#if !defined(__SANITIZE_ADDRESS__)

// One per thread; grows, never shrinks. take() hands out consecutive 64-byte aligned pieces of it until the next reset().
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Makes room for `bytes` in all, counting 64 spare bytes per piece; earlier pieces are gone.
  void reset(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + 63) / 64 * 64;
    data_ = static_cast<char*>(std::aligned_alloc(64, size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(data_ + used_);
    used_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return piece;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

#else

// The same, with every piece an allocation of its own: else AddressSanitizer would not notice a step from one into the next.
class Scratch {
 public:
  ~Scratch() { reset(0); }

  void reset(int64_t bytes) {
    for (void* piece : pieces_) std::free(piece);
    pieces_.clear();
    left_ = bytes;
  }

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = count * (int64_t)sizeof(T);
    void* piece = nullptr;
    left_ -= (bytes + 63) / 64 * 64;
    if (left_ < 0 || posix_memalign(&piece, 64, bytes) != 0) std::abort();  // more than reset() was asked for
    pieces_.push_back(piece);
    return static_cast<T*>(piece);
  }

 private:
  std::vector<void*> pieces_;
  int64_t left_ = 0;
};

#endif

inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace dlm
