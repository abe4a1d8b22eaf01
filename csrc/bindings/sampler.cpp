#include "../sampler.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../invalid_input.h"
#include "../stop_matcher.h"
#include "bindings.h"

namespace py = pybind11;

namespace fastalign {
namespace {

constexpr const char* kWantedLogits = "float32, or uint16 that holds the bits of bfloat16";

LogitsView view_logits(const py::object& logits, py::buffer_info* info) {
  if (PyObject_CheckBuffer(logits.ptr()) == 0) {
    throw py::type_error(std::string("logits must be an array of ") + kWantedLogits + ", got a " +
                         type_name(logits));
  }
  *info = py::reinterpret_borrow<py::buffer>(logits).request();
  check_aligned(*info, "logits");
  const bool wide = holds<float>(*info);
  if (!wide && !holds<std::uint16_t>(*info)) {
    throw py::value_error(std::string("logits must be an array of ") + kWantedLogits + ", got " +
                          dtype_name(*info));
  }
  if (info->ndim != 2) {
    throw py::value_error("logits must have 2 dimensions, got " + std::to_string(info->ndim));
  }
  const py::ssize_t row = info->strides[0], column = info->strides[1];
  // The strides of an array without elements or of one row or column mean nothing.
  if (info->size > 0 && info->shape[1] > 1 && column != info->itemsize) {
    throw py::value_error("logits must have contiguous rows, got a stride of " +
                          std::to_string(column) + " bytes between columns");
  }
  return {info->ptr, wide ? LogitsType::kFloat32 : LogitsType::kBfloat16,
          static_cast<std::size_t>(info->shape[0]), static_cast<std::size_t>(info->shape[1]),
          row / info->itemsize};
}

template <typename T>
py::buffer_info one_for_each_row(const py::object& values, const char* name, const char* wanted,
                                 std::size_t rows) {
  py::buffer_info info = borrow<T>(values, name, wanted);
  if (static_cast<std::size_t>(info.size) != rows) {
    throw py::value_error(std::string(name) + " has " + std::to_string(info.size) +
                          " entries but logits has " + std::to_string(rows) + " rows");
  }
  return info;
}

Isa isa_of(const std::string& name) {
  if (name == "best") return supported_isas().back();
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (name == isa_name(isa)) return isa;
  }
  throw py::value_error("isa is '" + name + "'; it is best, portable, avx2 or avx512");
}

py::tuple sample_arrays(const py::object& logits, const py::object& seeds,
                        const py::object& positions, double temperature, std::int64_t top_k,
                        double top_p, double min_p, std::int64_t threads, const std::string& isa) {
  py::buffer_info held;
  const LogitsView view = view_logits(logits, &held);
  const py::buffer_info seed = one_for_each_row<std::uint64_t>(seeds, "seeds", "uint64", view.rows);
  const py::buffer_info position =
      one_for_each_row<std::uint64_t>(positions, "positions", "uint64", view.rows);
  if (threads < 1) {
    throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  }
  const Isa chosen = isa_of(isa);
  const auto rows = static_cast<py::ssize_t>(view.rows);
  py::array_t<std::int32_t> token_ids(rows);
  py::array_t<float> logprobs(rows), sampling_logprobs(rows);
  const Draws draws{token_ids.mutable_data(), logprobs.mutable_data(),
                    sampling_logprobs.mutable_data()};
  {
    py::gil_scoped_release release;
    sample(view, static_cast<const std::uint64_t*>(seed.ptr),
           static_cast<const std::uint64_t*>(position.ptr), {temperature, top_k, top_p, min_p},
           static_cast<std::size_t>(threads), chosen, draws);
  }
  return py::make_tuple(token_ids, logprobs, sampling_logprobs);
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : supported_isas()) names.emplace_back(isa_name(isa));
  return names;
}

py::array_t<bool> push(StopMatcher& matcher, const py::object& rows, const py::object& token_ids) {
  const py::buffer_info row = borrow<std::int64_t>(rows, "rows", "int64");
  const py::buffer_info token = borrow<std::int32_t>(token_ids, "token_ids", "int32");
  if (row.size != token.size) {
    throw py::value_error("token_ids has " + std::to_string(token.size) + " entries but rows has " +
                          std::to_string(row.size));
  }
  py::array_t<bool> ended(row.size);
  bool* to = ended.mutable_data();
  // With the GIL, which is what keeps two threads from pushing at once; it takes microseconds.
  matcher.push(static_cast<const std::int64_t*>(row.ptr),
               static_cast<const std::int32_t*>(token.ptr), static_cast<std::size_t>(row.size), to);
  return ended;
}

}  // namespace

void bind_sampler(py::module_& m) {
  m.def("sample", &sample_arrays, py::arg("logits"), py::arg("seeds"), py::arg("positions"),
        py::kw_only(), py::arg("temperature") = 1.0, py::arg("top_k") = 0, py::arg("top_p") = 1.0,
        py::arg("min_p") = 0.0, py::arg("threads") = 1, py::arg("isa") = "best",
        "Draw one token from each row of logits.");
  m.def("sampler_isas", &isa_names, "Instruction sets that sample() runs on here.");

  // bytes alone: pybind11 would take str as its UTF-8, which is not what a token's text is.
  const auto strings = [](const py::sequence& values, const char* name) {
    std::vector<std::string> found;
    found.reserve(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const py::object value = values[i];
      if (!py::isinstance<py::bytes>(value)) {
        throw py::type_error(item(name, i) + " must be bytes, got a " + type_name(value));
      }
      found.push_back(value.cast<py::bytes>());
    }
    return found;
  };
  py::class_<TokenBytes, std::shared_ptr<TokenBytes>>(m, "TokenBytes",
                                                      "The bytes of each token, by its id.")
      .def(py::init([strings](const py::sequence& tokens) {
             return std::make_shared<TokenBytes>(TokenBytes{strings(tokens, "tokens")});
           }),
           py::arg("tokens"));
  py::class_<StopMatcher>(m, "StopMatcher", "Finds stop strings in rows that grow by tokens.")
      .def(py::init([strings](std::shared_ptr<TokenBytes> tokens, const py::sequence& stop,
                              std::size_t rows) {
             return StopMatcher(std::move(tokens), strings(stop, "stop"), rows);
           }),
           py::arg("tokens"), py::arg("stop"), py::arg("rows"))
      .def("push", &push, py::arg("rows"), py::arg("token_ids"),
           "Append a token to each of some rows; tells which of them a stop string ends.");
}

}  // namespace fastalign
