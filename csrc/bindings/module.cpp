// The extension module. This folder alone knows pybind11: the rest of csrc/ is plain C++17.
#include <pybind11/pybind11.h>

#include <exception>

#include "../invalid_input.h"
#include "bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_bridge, m) {
  m.doc() = "The native core of FastAlign; its types are in _bridge.pyi.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fastalign::InvalidInput& invalid) {
      py::set_error(PyExc_ValueError, invalid.what());
    }
  });

  fastalign::bind_packer(m);
  fastalign::bind_store(m);
  fastalign::bind_sampler(m);
}
