// The one file that knows pybind11: Python objects to borrowed views, C++ vectors to numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bridge.h"

namespace py = pybind11;

namespace {

std::string type_name(py::handle object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

// numpy's name for a buffer's element type, so that a message says int64 and not "l".
std::string dtype_name(const py::buffer_info& info) {
  return py::str(py::dtype(info));
}

template <typename T>
bool holds(const py::buffer_info& info) {
  return info.item_type_is_equivalent_to<T>();
}

// A borrowed one-dimensional contiguous buffer of one of the types Ts. It keeps the exporter's
// memory alive, so the data may be read after the GIL is released.
template <typename... Ts>
py::buffer_info borrow(py::handle object, const std::string& name, const char* wanted) {
  if (PyObject_CheckBuffer(object.ptr()) == 0) {
    throw py::type_error(name + " must be an array of " + wanted + ", got a " + type_name(object));
  }
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request();
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

std::string item(const char* name, std::size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

fastalign::PackedBatch pack(const py::sequence& input_ids, const py::sequence& loss_mask) {
  if (input_ids.size() != loss_mask.size()) {
    throw py::value_error("loss_mask has " + std::to_string(loss_mask.size()) +
                          " sequences but input_ids has " + std::to_string(input_ids.size()));
  }
  const std::size_t count = input_ids.size();
  std::vector<py::buffer_info> borrowed;
  borrowed.reserve(2 * count);
  std::vector<fastalign::SequenceView> sequences;
  sequences.reserve(count);
  for (std::size_t s = 0; s < count; ++s) {
    const auto& ids = borrowed.emplace_back(
        borrow<std::int32_t>(py::object(input_ids[s]), item("input_ids", s), "int32"));
    const auto& mask = borrowed.emplace_back(borrow<bool, std::uint8_t>(
        py::object(loss_mask[s]), item("loss_mask", s), "bool or uint8"));
    sequences.push_back(
        {static_cast<const std::int32_t*>(ids.ptr), static_cast<std::size_t>(ids.size),
         static_cast<const std::uint8_t*>(mask.ptr), static_cast<std::size_t>(mask.size)});
  }
  py::gil_scoped_release release;
  return fastalign::pack(sequences);
}

fastalign::Plan plan(const py::object& lengths, std::int64_t budget, std::int64_t ranks) {
  const py::buffer_info info = borrow<std::int64_t>(lengths, "lengths", "int64");
  py::gil_scoped_release release;
  return fastalign::plan(static_cast<const std::int64_t*>(info.ptr),
                         static_cast<std::size_t>(info.size), budget, ranks);
}

// A numpy view of a vector that a bound object owns. The object is the array's base: no copy, and
// the memory lives for as long as any view of it.
template <typename T>
auto view(std::vector<T> fastalign::PackedBatch::* field) {
  return [field](const py::object& self) {
    std::vector<T>& values = self.cast<fastalign::PackedBatch&>().*field;
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data(), self);
  };
}

}  // namespace

PYBIND11_MODULE(_bridge, m) {
  using fastalign::PackedBatch;

  m.doc() = "The native batching core of FastAlign; its types are in _bridge.pyi.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fastalign::InvalidInput& invalid) {
      py::set_error(PyExc_ValueError, invalid.what());
    }
  });

  py::class_<PackedBatch>(m, "PackedArrays", "One flat batch; every attribute is a view.")
      .def_property_readonly("input_ids", view(&PackedBatch::input_ids))
      .def_property_readonly("positions", view(&PackedBatch::positions))
      .def_property_readonly("cu_seqlens", view(&PackedBatch::cu_seqlens))
      .def_property_readonly("rows", view(&PackedBatch::rows))
      .def_property_readonly("targets", view(&PackedBatch::targets))
      .def_property_readonly("cu_rows", view(&PackedBatch::cu_rows));

  m.def("pack", &pack, py::arg("input_ids"), py::arg("loss_mask"),
        "Lay S token sequences end to end and find the positions that predict a target.");
  m.def("plan", &plan, py::arg("lengths"), py::arg("budget"), py::arg("ranks"),
        "Group examples into packs of at most `budget` tokens, as many on every rank.");
}
