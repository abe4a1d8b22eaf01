// What the binding files share: how Python objects become borrowed views, and who binds what.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace fastalign {

namespace py = pybind11;

void bind_packer(py::module_& m);
void bind_store(py::module_& m);
void bind_sampler(py::module_& m);

inline std::string type_name(py::handle object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

// numpy's name for a buffer's element type, so that a message says int64 and not "l".
inline std::string dtype_name(const py::buffer_info& info) {
  return py::str(py::dtype(info));
}

template <typename T>
bool holds(const py::buffer_info& info) {
  return info.item_type_is_equivalent_to<T>();
}

// To be asked before the type: numpy gives what is not aligned another format, and the same name.
inline void check_aligned(const py::buffer_info& info, const std::string& name) {
  const auto off = [&info](auto bytes) {
    return info.itemsize > 0 &&
           static_cast<std::uintptr_t>(bytes) % static_cast<std::uintptr_t>(info.itemsize) != 0;
  };
  bool wrong = off(reinterpret_cast<std::uintptr_t>(info.ptr));
  // The stride between fewer than two means nothing.
  for (std::size_t d = 0; d < info.strides.size() && info.size > 0; ++d) {
    wrong |= info.shape[d] > 1 && off(info.strides[d]);
  }
  if (wrong) {
    throw py::value_error(name + " must be aligned to its items of " +
                          std::to_string(info.itemsize) + " bytes");
  }
}

// A borrowed one-dimensional contiguous buffer of one of the types Ts. It keeps the exporter's
// memory alive, so the data may be read after the GIL is released.
template <typename... Ts>
py::buffer_info borrow(py::handle object, const std::string& name, const char* wanted) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) {
    throw py::type_error(name + " must be an array of " + wanted + ", got a " + type_name(object));
  }
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request();
  check_aligned(info, name);
  if (!(holds<Ts>(info) || ...)) {
    throw py::value_error(name + " must be an array of " + wanted + ", got " + dtype_name(info));
  }
  if (info.ndim != 1) {
    throw py::value_error(name + " must have 1 dimension, got " + std::to_string(info.ndim));
  }
  // The stride of an array of 0 or 1 elements means nothing.
  if (info.size > 1 && info.strides[0] != info.itemsize) {
    throw py::value_error(name + " must be contiguous, got a stride of " +
                          std::to_string(info.strides[0]) + " bytes");
  }
  return info;
}

}  // namespace fastalign
