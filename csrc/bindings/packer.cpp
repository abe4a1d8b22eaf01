#include "../packer.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../invalid_input.h"
#include "bindings.h"

namespace py = pybind11;

namespace fastalign {
namespace {

PackedBatch pack_arrays(const py::sequence& input_ids, const py::sequence& loss_mask) {
  if (input_ids.size() != loss_mask.size()) {
    throw py::value_error("loss_mask has " + std::to_string(loss_mask.size()) +
                          " sequences but input_ids has " + std::to_string(input_ids.size()));
  }
  const std::size_t count = input_ids.size();
  std::vector<py::buffer_info> borrowed;
  borrowed.reserve(2 * count);
  std::vector<SequenceView> sequences;
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
  return pack(sequences);
}

Plan plan_arrays(const py::object& lengths, std::int64_t budget, std::int64_t ranks) {
  const py::buffer_info info = borrow<std::int64_t>(lengths, "lengths", "int64");
  py::gil_scoped_release release;
  return plan(static_cast<const std::int64_t*>(info.ptr), static_cast<std::size_t>(info.size),
              budget, ranks);
}

// A numpy view of a vector that a bound object owns. The object is the array's base: no copy, and
// the memory lives for as long as any view of it.
template <typename T>
auto view(std::vector<T> PackedBatch::* field) {
  return [field](const py::object& self) {
    std::vector<T>& values = self.cast<PackedBatch&>().*field;
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data(), self);
  };
}

}  // namespace

void bind_packer(py::module_& m) {
  py::class_<PackedBatch>(m, "PackedArrays", "One flat batch; every attribute is a view.")
      .def_property_readonly("input_ids", view(&PackedBatch::input_ids))
      .def_property_readonly("positions", view(&PackedBatch::positions))
      .def_property_readonly("cu_seqlens", view(&PackedBatch::cu_seqlens))
      .def_property_readonly("rows", view(&PackedBatch::rows))
      .def_property_readonly("targets", view(&PackedBatch::targets))
      .def_property_readonly("cu_rows", view(&PackedBatch::cu_rows));

  m.def("pack", &pack_arrays, py::arg("input_ids"), py::arg("loss_mask"),
        "Lay S token sequences end to end and find the positions that predict a target.");
  m.def("plan", &plan_arrays, py::arg("lengths"), py::arg("budget"), py::arg("ranks"),
        "Group examples into packs of at most `budget` tokens, as many on every rank.");
}

}  // namespace fastalign
