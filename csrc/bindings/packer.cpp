#include "../packer.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "../invalid_input.h"
#include "bindings.h"

namespace py = pybind11;

namespace fastalign {
namespace {

// One-dimensional memory of another object.
struct Borrowed {
  const void* data;
  std::size_t size;
};

// Borrows arrays of one of the types Ts, one after another, and keeps their memory alive.
template <typename... Ts>
class Lender {
 public:
  Lender(const py::sequence& arrays, const char* name, const char* wanted)
      // A copy, which no other code can change while it is read.
      : arrays_(arrays), name_(name), wanted_(wanted) {}

  std::size_t size() const { return arrays_.size(); }

  Borrowed operator[](std::size_t index) {
    const py::handle array = arrays_[index];
    // The buffer protocol makes a format string and two small arrays for each array. For thousands
    // of short sequences that takes longer than packing them; plain numpy arrays are read directly.
    if (py::isinstance<py::array>(array)) {
      const auto numpy = py::reinterpret_borrow<py::array>(array);
      if (is_plain(numpy)) return {numpy.data(), static_cast<std::size_t>(numpy.size())};
    }
    infos_.push_back(borrow<Ts...>(array, item(name_, index), wanted_));
    return {infos_.back().ptr, static_cast<std::size_t>(infos_.back().size)};
  }

 private:
  bool is_plain(const py::array& numpy) const {
    const py::dtype dtype = numpy.dtype();
    return std::any_of(std::begin(dtypes_), std::end(dtypes_),
                       [&dtype](const py::dtype& wanted) { return dtype.is(wanted); }) &&
           numpy.ndim() == 1 && (numpy.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0 &&
           (numpy.size() <= 1 || numpy.strides(0) == numpy.itemsize());
  }

  py::tuple arrays_;
  std::vector<py::buffer_info> infos_;
  const char* name_;
  const char* wanted_;
  py::dtype dtypes_[sizeof...(Ts)] = {py::dtype::of<Ts>()...};
};

template <typename T>
std::vector<T> copied(const py::object& array, const char* name, const char* wanted) {
  const py::buffer_info info = borrow<T>(array, name, wanted);
  const T* data = static_cast<const T*>(info.ptr);
  return {data, data + info.size};
}

std::vector<std::int64_t> indices(const py::object& examples) {
  return copied<std::int64_t>(examples, "examples", "int64");
}

// The borrowed arrays and what was measured of them.
class BoundRagged {
 public:
  BoundRagged(const py::sequence& input_ids, const py::sequence& loss_mask,
              const py::object& counts, const py::object& weights, bool share_prefixes)
      : ids_(input_ids, "input_ids", "int32"),
        masks_(loss_mask, "loss_mask", "bool or uint8"),
        core_(measured(copied<std::int64_t>(counts, "counts", "int64"),
                       copied<float>(weights, "weights", "float32"), share_prefixes)) {}

  const Ragged& core() const { return core_; }

  py::tuple layout(const py::object& examples) const {
    const Layout made = fastalign::layout(core_.sizes(indices(examples)));
    py::list fields;
    for (const Field& field : made.fields) {
      fields.append(py::make_tuple(field.name, field.dtype, field.offset,
                                   field.offset + field.count * field.itemsize));
    }
    return py::make_tuple(made.bytes, fields);
  }

  Plan plan(std::int64_t budget, std::int64_t ranks, double token, double pair, double row) const {
    py::gil_scoped_release release;
    return core_.plan(budget, ranks, {token, pair, row});
  }

  void fill(const py::object& examples, const py::object& memory) const {
    const std::vector<std::int64_t> chosen = indices(examples);
    const py::buffer_info info = borrow<std::uint8_t>(memory, "memory", "uint8");
    if (info.readonly) throw py::value_error("memory must be writable");
    py::gil_scoped_release release;
    core_.fill(chosen, static_cast<unsigned char*>(info.ptr), static_cast<std::size_t>(info.size));
  }

 private:
  Ragged measured(const std::vector<std::int64_t>& counts, std::vector<float> weights,
                  bool share_prefixes) {
    if (ids_.size() != masks_.size()) {
      throw py::value_error("loss_mask has " + std::to_string(masks_.size()) +
                            " sequences but input_ids has " + std::to_string(ids_.size()));
    }
    std::vector<SequenceView> streams;
    streams.reserve(ids_.size());
    for (std::size_t s = 0; s < ids_.size(); ++s) {
      const Borrowed ids = ids_[s];
      const Borrowed mask = masks_[s];
      streams.push_back({static_cast<const std::int32_t*>(ids.data), ids.size,
                         static_cast<const std::uint8_t*>(mask.data), mask.size});
    }
    py::gil_scoped_release release;
    return {std::move(streams), counts, std::move(weights), share_prefixes};
  }

  Lender<std::int32_t> ids_;
  Lender<bool, std::uint8_t> masks_;
  Ragged core_;
};

// A numpy view of a vector that a bound object owns. The object is the array's base: no copy, and
// the memory lives for as long as any view of it.
template <typename T>
auto view(const std::vector<T>& (Ragged::*field)() const) {
  return [field](const py::object& self) {
    const std::vector<T>& values = (self.cast<const BoundRagged&>().core().*field)();
    py::array_t<T> array(static_cast<py::ssize_t>(values.size()), values.data(), self);
    array.attr("flags").attr("writeable") = false;
    return array;
  };
}

Plan plan_arrays(const py::object& lengths, const py::object& costs, std::int64_t budget,
                 std::int64_t ranks) {
  const std::vector<std::int64_t> tokens = copied<std::int64_t>(lengths, "lengths", "int64");
  const std::vector<double> prices = copied<double>(costs, "costs", "float64");
  py::gil_scoped_release release;
  return plan(tokens, prices, budget, ranks);
}

}  // namespace

void bind_packer(py::module_& m) {
  py::class_<BoundRagged>(m, "Ragged", "Examples of ragged token sequences, borrowed and measured.")
      .def(py::init<const py::sequence&, const py::sequence&, const py::object&, const py::object&,
                    bool>(),
           py::arg("input_ids"), py::arg("loss_mask"), py::arg("counts"), py::arg("weights"),
           py::arg("share_prefixes") = false)
      .def_property_readonly("tokens", view(&Ragged::tokens))
      .def_property_readonly("rows", view(&Ragged::rows))
      .def_property_readonly("pairs", view(&Ragged::pairs))
      .def("plan", &BoundRagged::plan, py::arg("budget"), py::arg("ranks"), py::arg("token"),
           py::arg("pair"), py::arg("row"),
           "Group the examples into packs of at most `budget` tokens, as many on every rank.")
      .def("layout", &BoundRagged::layout, py::arg("examples"),
           "How many bytes a pack of these examples takes, and where its arrays lie in them.")
      .def("fill", &BoundRagged::fill, py::arg("examples"), py::arg("memory"),
           "Write a pack of these examples into memory as `layout` has it.");

  m.def("plan", &plan_arrays, py::arg("lengths"), py::arg("costs"), py::arg("budget"),
        py::arg("ranks"),
        "Group examples into packs of at most `budget` tokens, as many on every rank.");
}

}  // namespace fastalign
