// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "schedule.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace spe {

#if defined(SPE_BUILD_X86)
namespace avx512_bf16 { extern const KernelTable kTable; }
namespace avx512 { extern const KernelTable kTable; }
namespace avx2 { extern const KernelTable kTable; }
#endif
namespace portable { extern const KernelTable kTable; }

// ------------------------------------------------------------------------------------------------------ the CPU

namespace {

std::vector<std::string> read_cpu_flags() {
  std::vector<std::string> flags;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) flags.push_back("avx2");
  if (__builtin_cpu_supports("fma")) flags.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) flags.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) flags.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) flags.push_back("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) flags.push_back("avx512vl");
  unsigned a, b, c, d;
  const bool leaf7 = __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool amx_tile = leaf7 && (d & (1u << 24));
  if (amx_tile && (d & (1u << 22))) flags.push_back("amx_bf16");
  if (__get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29))) flags.push_back("f16c");
  if (leaf7 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    // avx512f above includes the operating system's support for the registers
    if ((a & (1u << 5)) && __builtin_cpu_supports("avx512f")) flags.push_back("avx512_bf16");
    if (amx_tile && (a & (1u << 21))) flags.push_back("amx_fp16");
  }
#elif defined(__aarch64__)
  flags.push_back("neon");
#endif
  return flags;
}

bool has(const std::vector<std::string>& flags, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    bool found = false;
    for (const auto& flag : flags) found = found || flag == name;
    if (!found) return false;
  }
  return true;
}

std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(SPE_BUILD_X86)
  const auto flags = read_cpu_flags();
  const bool avx2 = has(flags, {"avx2", "fma", "f16c"});
  const bool avx512 = avx2 && has(flags, {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
  if (avx512 && has(flags, {"avx512_bf16"})) tables.push_back(&avx512_bf16::kTable);
  if (avx512) tables.push_back(&avx512::kTable);
  if (avx2) tables.push_back(&avx2::kTable);
#endif
  tables.push_back(&portable::kTable);
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const auto all = usable_tables();
  return all;
}

std::atomic<size_t>& first_table() {
  static std::atomic<size_t> index{0};
  return index;
}

template <class Kernel>
Kernel pick(Kernel const (KernelTable::*row)[3], DType dtype) {
  for (size_t i = first_table(); i < tables().size(); ++i)
    if (Kernel kernel = (tables()[i]->*row)[static_cast<int>(dtype)]) return kernel;
  throw std::logic_error("the portable build lacks a kernel");
}

}  // namespace

const std::vector<std::string>& cpu_flags() {
  static const auto flags = read_cpu_flags();  // in a virtual machine cpuid takes 10 us
  return flags;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const auto* table : tables()) names.emplace_back(table->isa);
  return names;
}

std::string current_isa() { return tables()[first_table()]->isa; }

void use_isa(const std::string& isa) {
  for (size_t i = 0; i < tables().size(); ++i)
    if (isa == tables()[i]->isa) {
      first_table() = i;
      return;
    }
  throw std::invalid_argument("this CPU, or this build, has no kernels for " + isa);
}

void forward(const Problem& p, const ForwardTensors& t) { pick(&KernelTable::forward, p.dtype)(p, t); }
void backward(const Problem& p, const BackwardTensors& t) { pick(&KernelTable::backward, p.dtype)(p, t); }
void rotate(const Rotation& r) { pick(&KernelTable::rotate, r.dtype)(r); }
double peak_flops(DType dtype) { return pick(&KernelTable::peak, dtype)(); }

// -------------------------------------------------------------------------------------------------------- threads

namespace {
std::atomic<bool> workers_ran{false};
std::atomic<bool> workers_lost{false};
}  // namespace

int usable_threads(int wanted) {
#if defined(_OPENMP)
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    if (workers_ran) workers_lost = true;
  });
  if (wanted <= 1 || workers_lost || registered != 0) return 1;
  workers_ran = true;
  return wanted;
#else
  (void)wanted;
  return 1;
#endif
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace spe
