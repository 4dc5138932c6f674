// SPDX-License-Identifier: Apache-2.0
// spatial_pe._cuda: what was compiled for CUDA, and the devices that it finds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA target of spatial_pe.";
  m.attr("compiler") = SPE_CUDA_COMPILER;
  m.attr("architectures") = SPE_CUDA_ARCHS;
  m.def(
      "devices",
      [] {
        std::string error;
        py::list out;
        for (const auto& d : spe::cuda::devices(error)) {
          py::dict row;
          row["name"] = d.name;
          row["capability"] = py::make_tuple(d.major, d.minor);
          row["multiprocessors"] = d.multiprocessors;
          row["shared_memory_per_block"] = d.shared_memory_per_block;
          out.append(row);
        }
        return py::make_tuple(out, error);
      },
      "(devices, error): the devices that the CUDA runtime finds, and why there are none.");
}
