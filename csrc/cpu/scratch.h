// SPDX-License-Identifier: Apache-2.0
// Aligned working memory of a thread or of one call, cut into pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace spe {

// Allocated once, in pieces of whole cache lines, zeroed: garbage in unused rows would be harmless, denormals slow.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes == 0) return;
    data_ = static_cast<char*>(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(size_t count) {
    T* out = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_of<T>(count);
    return out;
  }
  template <class T>
  static size_t bytes_of(size_t count) {
    return (count * sizeof(T) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr size_t kLine = 64;
  char* data_ = nullptr;
  size_t used_ = 0;
};

}  // namespace spe
