// SPDX-License-Identifier: Apache-2.0
// spatial_pe._cuda: the CUDA kernels as Python functions of plain numbers and addresses. Arguments were checked in
// Python. The same source makes _cuda_emulated, whose kernels run on the host (for tests).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "launch.h"

namespace py = pybind11;

namespace spe::cuda {

#ifdef SPE_EMULATED
void bind_emulator(py::module_& m);  // emulator/launch.cpp
#endif

namespace {

using ViewTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides (batch, token, head)
using Plan = std::vector<Launch> (*)(const Call&, const Device&);

Tensor view(const ViewTuple& t) {
  return {reinterpret_cast<uint16_t*>(std::get<0>(t)), std::get<1>(t), static_cast<int>(std::get<2>(t)),
          static_cast<int>(std::get<3>(t))};
}

DType dtype_of(const std::string& name) {
  return name == "bfloat16" ? DType::bfloat16 : name == "float16" ? DType::float16 : DType::float32;
}

Pairing pairing_of(const std::string& name) {
  return name == "half" ? Pairing::half : name == "interleaved" ? Pairing::interleaved : Pairing::axis_half;
}

// form: 0 dense, 1 packed, 2 padded (sequences.h)
Call call_of(const py::dict& d) {
  Call call{};
  Params& p = call.params;
  call.dtype = dtype_of(d["dtype"].cast<std::string>());
  p.heads = d["heads"].cast<int>();
  p.group = p.heads / d["kv_heads"].cast<int>();
  p.head_dim = d["head_dim"].cast<int>();
  p.scale = d["scale"].cast<float>();
  p.scale2 = p.scale * LOG2_E;
  p.sequences = {static_cast<Form>(d["form"].cast<int>()), reinterpret_cast<const int*>(d["bounds"].cast<uintptr_t>()),
                 d["sequences"].cast<int>(), d["tokens"].cast<int>(), d["longest"].cast<int>()};
  p.rotate_vector = d["vector"].cast<int>();
  p.rotate_inputs = d.contains("cos");
  if (p.rotate_inputs) {
    const Tensor cos = view(d["cos"].cast<ViewTuple>());
    p.tables = {reinterpret_cast<const float*>(cos.data), reinterpret_cast<const float*>(d["sin"].cast<uintptr_t>()),
                cos.batch, cos.token, cos.head};
    p.pairs = channel_pairs(d["rotary_dim"].cast<int>(), pairing_of(d["pairing"].cast<std::string>()));
  }
  p.rotated = Vectors(p.pairs.rotary_dim / (2 * p.rotate_vector));
  p.all = Vectors(p.head_dim / (2 * p.rotate_vector));
  return call;
}

// Properties of the device that the plan is for. Cached: reading them takes longer than a kernel.
const Device& device_of(int index) {
#ifdef SPE_EMULATED
  std::string error;
  static std::vector<Device> found;
  found = devices(error);
#else
  std::string error;
  static const std::vector<Device> found = devices(error);
#endif
  if (index < 0 || index >= static_cast<int>(found.size()))
    throw py::value_error("device " + std::to_string(index) + ": the CUDA runtime finds " +
                          std::to_string(found.size()) +
                          (error.empty() ? "" : " (" + error + ")"));
  return found[index];
}

Call forward_call(const py::dict& d, const ViewTuple& q, const ViewTuple& k, const ViewTuple& v, const ViewTuple& out,
                  uintptr_t lse) {
  Call call = call_of(d);
  Params& p = call.params;
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out);
  p.lse = reinterpret_cast<float*>(lse);
  return call;
}

void forward(const py::dict& d, ViewTuple q, ViewTuple k, ViewTuple v, ViewTuple out, uintptr_t lse, int device,
             uintptr_t stream) {
  const Call call = forward_call(d, q, k, v, out, lse);
  run(plan_forward(call, device_of(device)), device, stream);
}

// scratch: delta (batch, heads, tokens) float32, and q and k rotated, like q and k; 0 where `scratch_wanted` is false.
void backward(const py::dict& d, ViewTuple q, ViewTuple k, ViewTuple v, ViewTuple out, uintptr_t lse, ViewTuple dout,
              ViewTuple dq, ViewTuple dk, ViewTuple dv, uintptr_t delta, ViewTuple q_rotated, ViewTuple k_rotated,
              int device, uintptr_t stream) {
  Call call = forward_call(d, q, k, v, out, lse);
  Params& p = call.params;
  p.dout = view(dout), p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  p.delta = reinterpret_cast<float*>(delta);
  p.q_rotated = view(q_rotated), p.k_rotated = view(k_rotated);
  run(plan_backward(call, device_of(device)), device, stream);
}

// Whether a backward of such calls needs scratch memory.
bool scratch_wanted(const py::dict& d, int device) {
  return plan_backward(call_of(d), device_of(device)).size() > 1;
}

py::list described(const std::vector<Launch>& launches) {
  py::list rows;
  for (const Launch& launch : launches) {
    py::dict row;
    row["kernel"] = launch.kernel.name;
    row["blocks"] = launch.blocks;
    row["threads"] = launch.threads;
    row["shared"] = launch.shared;
    row["resident"] = launch.params.parts > 0;
    row["passes"] = launch.params.passes;
    row["slots"] = launch.params.slots;
    row["stages"] = launch.params.stages;
    rows.append(row);
  }
  return rows;
}

// The launches of a call on a device that need not be present.
py::list plan(const py::dict& d, const std::string& direction, int multiprocessors, int shared_per_block,
              int shared_per_multiprocessor) {
  const Device device{"", 0, 0, multiprocessors, shared_per_block, shared_per_multiprocessor};
  const Plan of = direction == "forward" ? plan_forward : plan_backward;
  return described(of(call_of(d), device));
}

py::tuple found_devices() {
  std::string error;
  py::list rows;
  for (const Device& device : devices(error)) {
    py::dict row;
    row["name"] = device.name;
    row["capability"] = py::make_tuple(device.major, device.minor);
    row["multiprocessors"] = device.multiprocessors;
    row["shared_memory_per_block"] = device.shared_per_block;
    rows.append(row);
  }
  return py::make_tuple(rows, error);
}

}  // namespace

PYBIND11_MODULE(SPE_MODULE, m) {
  m.doc() = "Fused 2D-RoPE attention on CUDA devices.";
  using namespace py::literals;
  m.attr("compiler") = SPE_CUDA_COMPILER;
  m.attr("architectures") = SPE_CUDA_ARCHS;
  m.attr("head_dims") = std::vector<int>(std::begin(HEAD_DIMS), std::end(HEAD_DIMS));
  m.def("devices", &found_devices,
        "(devices, error): the devices that the CUDA runtime finds, and why there are none.");
  m.def("forward", &forward, "call"_a, py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "device"_a, "stream"_a);
  m.def("backward", &backward, "call"_a, py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a, "dq"_a, "dk"_a,
        "dv"_a, "delta"_a, "q_rotated"_a, "k_rotated"_a, "device"_a, "stream"_a);
  m.def("scratch_wanted", &scratch_wanted, "call"_a, "device"_a);
  m.def("plan", &plan, "call"_a, "direction"_a, "multiprocessors"_a, "shared_per_block"_a,
        "shared_per_multiprocessor"_a);
#ifdef SPE_EMULATED
  bind_emulator(m);
#endif
}

}  // namespace spe::cuda
