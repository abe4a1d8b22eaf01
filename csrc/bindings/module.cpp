// The extension module. This folder alone knows pybind11: the rest of csrc/ is plain C++17.
#include <pybind11/pybind11.h>

#include "bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_bridge, m) {
  m.doc() = "The native core of FastAlign; its types are in _bridge.pyi.";

  fastalign::bind_packer(m);
  fastalign::bind_store(m);
  fastalign::bind_sampler(m);
}
