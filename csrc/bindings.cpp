// SPDX-License-Identifier: Apache-2.0
// spatial_pe._C: the kernels as Python functions of plain numbers and addresses. Arguments were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using ViewTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides (batch, token, head)

spe::View view(const ViewTuple& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

template <class T>
T lookup(const std::map<std::string, T>& table, const std::string& key, const char* what) {
  const auto it = table.find(key);
  if (it == table.end()) throw py::value_error(std::string(what) + ": unknown value " + key);
  return it->second;
}

spe::DType dtype(const std::string& name) {
  return lookup<spe::DType>({{"float32", spe::DType::float32}, {"bfloat16", spe::DType::bfloat16},
                             {"float16", spe::DType::float16}}, name, "dtype");
}

spe::Tables tables(const py::dict& d, const char* cos_name, const char* sin_name) {
  const auto cos = view(d[cos_name].cast<ViewTuple>()), sin = view(d[sin_name].cast<ViewTuple>());
  return {static_cast<const float*>(cos.data), static_cast<const float*>(sin.data), cos.batch, cos.token, cos.head};
}

spe::ChannelPairs channel_pairs(const py::dict& d) {
  const auto pairing = lookup<spe::Pairing>({{"half", spe::Pairing::half}, {"interleaved", spe::Pairing::interleaved},
                                             {"axis_half", spe::Pairing::axis_half}},
                                            d["pairing"].cast<std::string>(), "pairing");
  return spe::channel_pairs(d["rotary_dim"].cast<int>(), pairing);
}

spe::Problem problem(const py::dict& d) {
  spe::Problem p;
  p.dtype = dtype(d["dtype"].cast<std::string>());
  p.batch = d["batch"].cast<int64_t>();
  p.tokens = d["tokens"].cast<int64_t>();
  p.heads = d["heads"].cast<int>();
  p.kv_heads = d["kv_heads"].cast<int>();
  p.head_dim = d["head_dim"].cast<int>();
  p.scale = d["scale"].cast<float>();
  p.threads = d["threads"].cast<int>();
  for (const auto& [sample, start, length, key_start, keys] : d["sequences"].cast<std::vector<std::array<int64_t, 5>>>())
    if (length > 0 && keys > 0) p.sequences.push_back({sample, start, length, key_start, keys});
  if (d.contains("cos")) {
    p.tables = tables(d, "cos", "sin");
    p.key_tables = d.contains("cos_k") ? tables(d, "cos_k", "sin_k") : p.tables;
    p.pairs = channel_pairs(d);
  }
  return p;
}

void forward(const py::dict& d, ViewTuple q, ViewTuple k, ViewTuple v, ViewTuple out, uintptr_t lse) {
  const spe::Problem p = problem(d);
  const spe::ForwardTensors t{view(q), view(k), view(v), view(out), reinterpret_cast<float*>(lse)};
  const py::gil_scoped_release release;
  spe::forward(p, t);
}

void backward(const py::dict& d, ViewTuple q, ViewTuple k, ViewTuple v, ViewTuple out, uintptr_t lse, ViewTuple dout,
              ViewTuple dq, ViewTuple dk, ViewTuple dv) {
  const spe::Problem p = problem(d);
  const spe::BackwardTensors t{view(q),  view(k),  view(v),  view(out), view(dout),
                               view(dq), view(dk), view(dv), reinterpret_cast<const float*>(lse)};
  const py::gil_scoped_release release;
  spe::backward(p, t);
}

void rotate(const py::dict& d, ViewTuple x, ViewTuple out) {
  spe::Rotation r;
  r.dtype = dtype(d["dtype"].cast<std::string>());
  r.batch = d["batch"].cast<int64_t>();
  r.tokens = d["tokens"].cast<int64_t>();
  r.heads = d["heads"].cast<int>();
  r.head_dim = d["head_dim"].cast<int>();
  r.threads = d["threads"].cast<int>();
  r.tables = tables(d, "cos", "sin");
  r.pairs = channel_pairs(d);
  r.x = view(x);
  r.out = view(out);
  const py::gil_scoped_release release;
  spe::rotate(r);
}

double peak_flops(const std::string& name) {
  const py::gil_scoped_release release;
  return spe::peak_flops(dtype(name));
}

py::dict cpu_features() {
  py::dict out;
  out["isa"] = spe::current_isa();
  out["usable_isas"] = spe::usable_isas();
  out["flags"] = spe::cpu_flags();
  out["compiler"] = SPE_COMPILER;
#if defined(_OPENMP)
  out["openmp"] = true;
#else
  out["openmp"] = false;
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Fused 2D-RoPE attention on the CPU.";
  using namespace py::literals;
  m.def("forward", &forward, "problem"_a, py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a);
  m.def("backward", &backward, "problem"_a, py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a, "dq"_a,
        "dk"_a, "dv"_a);
  m.def("rotate", &rotate, "rotation"_a, py::kw_only(), "x"_a, "out"_a);
  m.def("cpu_features", &cpu_features, "The instruction set in use, those usable, CPU flags and how this was compiled.");
  m.def("peak_flops", &peak_flops, "dtype"_a, "FLOP per second of a dtype's multiply-adds on registers, on one core.");
  m.def("use_isa", &spe::use_isa, "isa"_a, "Use the kernels of a lower instruction set (for tests).");
}
