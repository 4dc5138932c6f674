// SPDX-License-Identifier: Apache-2.0
// Launches on the emulator, for a device chosen by tests; and its Python functions.
#include "../launch.h"

#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>

#include "emulator.h"

namespace py = pybind11;

namespace spe::cuda {

namespace {

// 2 SMs: blocks that work on several items, and several blocks.
Device current{"emulator", 9, 0, 2, 227 * 1024, 228 * 1024};

struct Sizes {
  int64_t samples, tokens;
};

Sizes sizes_of(const Params& p) {
  return {p.sequences.form == Form::packed ? 1 : p.sequences.count, p.sequences.tokens};
}

size_t bytes_of(const Tensor& x, const Params& p, int heads) {
  const Sizes n = sizes_of(p);
  return 2 * ((n.samples - 1) * x.batch + (n.tokens - 1) * x.token + (heads - 1) * x.head + p.head_dim);
}

// Allows a launch to read its kernel's inputs and to write its outputs.
class Ranges {
 public:
  explicit Ranges(const Launch& launch) : p_(launch.params) {
    emulator::forget_ranges();
    const std::string kernel = launch.kernel.name;
    const int kv_heads = p_.heads / p_.group;
    const size_t numbers = sizes_of(p_).samples * sizes_of(p_).tokens * p_.heads * sizeof(float);
    if (p_.sequences.form != Form::dense)
      emulator::allow_read(p_.sequences.bounds,
                           (p_.sequences.count + (p_.sequences.form == Form::packed)) * sizeof(int));
    if (p_.pairs.rotary_dim > 0) {
      const AngleTables& t = p_.tables;
      const Sizes n = sizes_of(p_);
      const int64_t last = (n.samples - 1) * t.batch + (n.tokens - 1) * t.token + (p_.heads - 1) * t.head;
      const size_t bytes = 4 * (last + p_.pairs.rotary_dim / 2);
      emulator::allow_read(t.cos, bytes);
      emulator::allow_read(t.sin, bytes);
    }
    read(p_.q, p_.heads), read(p_.k, kv_heads);
    if (kernel == "prepare") {
      read(p_.out, p_.heads), read(p_.dout, p_.heads);
      write(p_.delta, numbers);
      if (p_.rotate_inputs) write(p_.q_rotated, p_.heads), write(p_.k_rotated, kv_heads);
      return;
    }
    read(p_.v, kv_heads);
    if (kernel == "forward" || kernel.rfind("windows", 0) == 0) {
      write(p_.out, p_.heads), write(p_.lse, numbers);
      return;
    }
    read(p_.dout, p_.heads);
    emulator::allow_read(p_.lse, numbers);
    if (p_.whole && kernel.rfind("keys", 0) == 0)
      read(p_.out, p_.heads);
    else
      emulator::allow_read(p_.delta, numbers);
    if (kernel == "queries" || p_.whole) write(p_.dq, p_.heads);
    if (kernel != "queries") write(p_.dk, kv_heads), write(p_.dv, kv_heads);
  }

  // Without padding every token has a result.
  void check(const Launch& launch) const {
    if (p_.sequences.form == Form::padded) return;
    for (const auto& [data, bytes] : written_)
      if (const size_t left = emulator::unwritten(data, bytes))
        throw std::runtime_error(describe(launch) + ": leaves " + std::to_string(left) +
                                 " bytes of a result unwritten");
  }

 private:
  void read(const Tensor& x, int heads) const { emulator::allow_read(x.data, bytes_of(x, p_, heads)); }
  void write(const Tensor& x, int heads) { write(x.data, bytes_of(x, p_, heads)); }
  void write(void* data, size_t bytes) {
    emulator::allow_write(data, bytes);
    written_.emplace_back(data, bytes);
  }

  const Params& p_;
  std::vector<std::pair<void*, size_t>> written_;
};

}  // namespace

std::vector<Device> devices(std::string&) { return {current}; }

void run(const std::vector<Launch>& launches, int, uintptr_t) {
  for (const Launch& launch : launches) {
    if (launch.shared > current.shared_per_block) throw std::runtime_error(describe(launch) + ": the device has less");
    Ranges ranges(launch);
    const auto kernel = reinterpret_cast<void (*)(Params)>(const_cast<void*>(launch.kernel.function));
    emulator::run({launch.kernel.name, launch.blocks, launch.threads, static_cast<size_t>(launch.shared)},
                  [&] { kernel(launch.params); });
    ranges.check(launch);
  }
}

void bind_emulator(py::module_& m) {
  using namespace py::literals;
  m.def("use_device",
        [](int multiprocessors, int shared_per_block, int shared_per_multiprocessor) {
          current.multiprocessors = multiprocessors;
          current.shared_per_block = shared_per_block;
          current.shared_per_multiprocessor = shared_per_multiprocessor;
        },
        "multiprocessors"_a = 2, "shared_per_block"_a = 227 * 1024, "shared_per_multiprocessor"_a = 228 * 1024,
        "Set the emulated device.");
  m.def("allow_rewrites", &emulator::allow_rewrites, "allowed"_a, "Set whether results may be written twice.");
  m.def("set_schedule", &emulator::set_schedule, "seed"_a, "Set the order in which threads run; 0: the default.");
}

}  // namespace spe::cuda
