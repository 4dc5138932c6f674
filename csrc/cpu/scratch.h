// SPDX-License-Identifier: Apache-2.0
// Working memory of a call, aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

namespace spe {

constexpr size_t kCacheLine = 64;
constexpr size_t whole_lines(size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// Memory split into equal parts: that of an item, then those of the threads. The calling thread keeps up to 32 MB for
// its next call, because new memory is cleared and touched page by page: 2 to 3 % of a call with 196 tokens.  New
// memory, or memory with another split, is zeroed: garbage in unused rows is harmless, but denormals in them are slow.
class Workspace {
 public:
  Workspace(size_t item_bytes, size_t thread_bytes, int threads) {
    const size_t bytes = (item_bytes + thread_bytes) * static_cast<size_t>(threads);
    Kept& kept = kept_by_this_thread();
    const bool fits = kept.bytes >= bytes;
    if (!fits) {
      kept.release();
      kept.data = static_cast<char*>(std::aligned_alloc(kCacheLine, bytes));
      if (!kept.data) throw std::bad_alloc();
      kept.bytes = bytes;
    }
    if (!fits || kept.item_bytes != item_bytes || kept.thread_bytes != thread_bytes) std::memset(kept.data, 0, bytes);
    kept.item_bytes = item_bytes;
    kept.thread_bytes = thread_bytes;
  }
  ~Workspace() {
    if (kept_by_this_thread().bytes > kMostKept) kept_by_this_thread().release();
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return kept_by_this_thread().data; }

 private:
  static constexpr size_t kMostKept = size_t{32} << 20;

  struct Kept {
    char* data = nullptr;
    size_t bytes = 0, item_bytes = 0, thread_bytes = 0;
    void release() {
      std::free(data);
      data = nullptr;
      bytes = 0;
    }
    ~Kept() { release(); }
  };
  static Kept& kept_by_this_thread() {
    static thread_local Kept kept;
    return kept;
  }
};

}  // namespace spe
