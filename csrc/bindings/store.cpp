#include "../store.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../invalid_input.h"
#include "bindings.h"

namespace py = pybind11;

namespace fastalign {
namespace {

// Numbers of a caller: a list or tuple of Python's, or a buffer, which is borrowed.
struct Numbers {
  const char* name;
  py::object items;
  py::buffer_info buffer;

  std::size_t size() const {
    return static_cast<std::size_t>(items ? PySequence_Fast_GET_SIZE(items.ptr()) : buffer.size);
  }
};

template <typename... Ts>
Numbers numbers(const py::object& object, const char* name, const char* wanted) {
  if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) return {name, object, {}};
  return {name, {}, borrow<Ts...>(object, name, wanted)};
}

// Reads `size` items one by one. Converting one may run Python code, and that may change the list.
template <typename T, typename Convert>
void copy_items(const Numbers& from, T* to, std::size_t size, Convert convert) {
  for (std::size_t i = 0; i < size; ++i) {
    if (i >= from.size()) throw py::value_error(std::string(from.name) + " changed while read");
    PyObject* const borrowed =
        PySequence_Fast_GET_ITEM(from.items.ptr(), static_cast<Py_ssize_t>(i));
    const auto object = py::reinterpret_borrow<py::object>(borrowed);
    to[i] = convert(object, i);
  }
}

bool is_token(std::int64_t value) {
  return value >= 0 && value <= std::numeric_limits<std::int32_t>::max();
}

[[noreturn]] void refuse_token(const Numbers& from, std::size_t i, const std::string& value) {
  throw InvalidInput(item(from.name, i) + " is " + value + "; token ids are from 0 to 2147483647");
}

// Python could not convert an item; what else it may have raised is left as it is.
[[noreturn]] void refuse_type(const Numbers& from, std::size_t i, const char* wanted,
                              const py::object& object) {
  if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
  PyErr_Clear();
  throw py::type_error(item(from.name, i) + " must be " + wanted + ", got a " + type_name(object));
}

std::int32_t token(const Numbers& from, std::size_t i, const py::object& object) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) refuse_type(from, i, "an int", object);
  int overflow = 0;
  const std::int64_t value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || !is_token(value)) refuse_token(from, i, py::str(index));
  return static_cast<std::int32_t>(value);
}

void copy_tokens(const Numbers& from, std::int32_t* to, std::size_t size) {
  if (from.items) {
    copy_items(from, to, size,
               [&](const py::object& object, std::size_t i) { return token(from, i, object); });
  } else if (holds<std::int32_t>(from.buffer)) {
    if (size > 0) std::memcpy(to, from.buffer.ptr, size * sizeof *to);
  } else {
    const auto* values = static_cast<const std::int64_t*>(from.buffer.ptr);
    for (std::size_t i = 0; i < size; ++i) {
      const std::int64_t value = values[i];
      if (!is_token(value)) refuse_token(from, i, std::to_string(value));
      to[i] = static_cast<std::int32_t>(value);
    }
  }
}

void copy_logprobs(const Numbers& from, float* to, std::size_t size) {
  if (from.items) {
    copy_items(from, to, size, [&](const py::object& object, std::size_t i) {
      const double value = PyFloat_AsDouble(object.ptr());
      if (value == -1.0 && PyErr_Occurred() != nullptr) {
        refuse_type(from, i, "a float", object);
      }
      return static_cast<float>(value);
    });
  } else if (holds<float>(from.buffer)) {
    if (size > 0) std::memcpy(to, from.buffer.ptr, size * sizeof *to);
  } else {
    const auto* values = static_cast<const double*>(from.buffer.ptr);
    for (std::size_t i = 0; i < size; ++i) to[i] = static_cast<float>(values[i]);
  }
}

// A read-only array of what lies in a mapping. The mapping is its base, so that it outlives the
// store, and numpy does not let the array be made writable.
template <typename T>
py::array_t<T> view(const Span<T>& span) {
  using Holder = std::shared_ptr<const Mapping>;
  const py::capsule base(new Holder(span.mapping),
                         [](void* holder) { delete static_cast<Holder*>(holder); });
  auto array = py::array_t<T>(static_cast<py::ssize_t>(span.size), span.data, base);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

py::bytes bytes_of(const Span<std::uint8_t>& span) {
  return py::bytes(reinterpret_cast<const char*>(span.data), span.size);
}

Store::Limit limit_of(const std::optional<double>& timeout) {
  if (!timeout) return std::nullopt;
  if (!(*timeout >= 0)) {
    throw InvalidInput("timeout must be None or at least 0 s, got " + std::to_string(*timeout));
  }
  return std::chrono::duration<double>(*timeout);
}

// Lets Ctrl-C end a wait of the main thread, which alone is told of signals. The others leave the
// GIL alone: one that still waits when the interpreter ends could not take it.
Store::Poll check_signals() {
  const py::module_ threading = py::module_::import("threading");
  if (!threading.attr("current_thread")().is(threading.attr("main_thread")())) return [] {};
  return [] {
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

Finish finish_of(const std::string& reason) {
  if (reason == "stop") return Finish::stop;
  if (reason == "length") return Finish::length;
  throw InvalidInput("finish_reason must be 'stop' or 'length', got '" + reason + "'");
}

const char* name_of(Finish finish) {
  return finish == Finish::stop ? "stop" : "length";
}

// As os.fsencode: str, bytes or a path object; names that are no UTF-8 come as surrogates.
std::string path_of(const py::object& object) {
  PyObject* encoded = nullptr;
  if (PyUnicode_FSConverter(object.ptr(), &encoded) == 0) throw py::error_already_set();
  std::string path = py::reinterpret_steal<py::bytes>(encoded);
  if (path.empty()) throw InvalidInput("path is empty");
  return path;
}

// A message that names a path, as os.fsdecode.
py::str message_of(const std::exception& error) {
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeFSDefault(error.what()));
}

std::unique_ptr<Store> open_store(const py::object& path, std::int64_t max_bytes,
                                  std::optional<std::int64_t> capacity) {
  if (max_bytes < 0) {
    throw InvalidInput("max_bytes must be at least 0, got " + std::to_string(max_bytes));
  }
  if (capacity && *capacity < 1) {
    throw InvalidInput("capacity must be None or at least 1, got " + std::to_string(*capacity));
  }
  const std::string name = path.is_none() ? "" : path_of(path);
  py::gil_scoped_release release;
  return std::make_unique<Store>(name, static_cast<std::uint64_t>(max_bytes),
                                 static_cast<std::size_t>(capacity.value_or(0)));
}

// An argument that must be an integer of type T; pybind11's own message has many lines.
template <typename T>
T integer(const py::object& object, const char* name) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(std::string(name) + " must be an int, got a " + type_name(object));
  }
  T value;
  if constexpr (std::is_signed_v<T>) {
    value = PyLong_AsLongLong(index.ptr());
  } else {
    value = PyLong_AsUnsignedLongLong(index.ptr());
  }
  if (value != static_cast<T>(-1) || PyErr_Occurred() == nullptr) return value;
  PyErr_Clear();
  throw InvalidInput(std::string(name) + " is " + std::string(py::str(index)) +
                     "; it must be from " + std::to_string(std::numeric_limits<T>::min()) + " to " +
                     std::to_string(std::numeric_limits<T>::max()));
}

std::int64_t append_prompt(Store& store, const py::object& token_ids) {
  const Numbers ids = numbers<std::int32_t, std::int64_t>(token_ids, "token_ids", "int32 or int64");
  std::vector<std::int32_t> copied(ids.size());
  copy_tokens(ids, copied.data(), copied.size());
  py::gil_scoped_release release;
  return store.append_prompt(copied.data(), copied.size());
}

std::int64_t append(Store& store, const py::object& prompt, const py::object& settings,
                    const py::object& token_ids, const py::object& logprobs,
                    const std::string& finish_reason, const py::object& seed,
                    const py::object& weight_version, const std::optional<double>& timeout) {
  const Numbers ids = numbers<std::int32_t, std::int64_t>(token_ids, "token_ids", "int32 or int64");
  const Numbers probs = numbers<float, double>(logprobs, "logprobs", "float32 or float64");
  const std::size_t length = ids.size();
  if (probs.size() != length) {
    throw InvalidInput("logprobs has " + std::to_string(probs.size()) +
                       " entries but token_ids has " + std::to_string(length) + " tokens");
  }
  const Store::Limit limit = limit_of(timeout);
  const RolloutInfo info{
      integer<std::int64_t>(prompt, "prompt"), integer<std::int64_t>(settings, "settings"),
      integer<std::uint64_t>(seed, "seed"), integer<std::int64_t>(weight_version, "weight_version"),
      finish_of(finish_reason)};
  NewRollout rollout(info, length);
  copy_tokens(ids, rollout.token_ids(), length);
  copy_logprobs(probs, rollout.logprobs(), length);
  const Store::Poll poll = check_signals();
  py::gil_scoped_release release;
  return store.append(std::move(rollout), limit, poll);
}

std::vector<Rollout> take(Store& store, std::int64_t n, const std::optional<double>& timeout) {
  if (n < 1) throw InvalidInput("n must be at least 1, got " + std::to_string(n));
  const Store::Limit limit = limit_of(timeout);
  const Store::Poll poll = check_signals();
  py::gil_scoped_release release;
  return store.take(static_cast<std::size_t>(n), limit, poll);
}

std::string_view borrowed(const py::bytes& bytes) {
  return bytes;
}

py::object recovery_reason(const Recovery& recovery) {
  return recovery.dropped == 0 ? py::object(py::none()) : py::str(recovery.reason);
}

}  // namespace

void bind_store(py::module_& m) {
  // They live as long as the process does, as the translator that uses them.
  static PyObject* const corrupt =
      py::exception<CorruptJournal>(m, "CorruptJournal", PyExc_ValueError).release().ptr();
  static PyObject* const foreign =
      py::exception<NotAJournal>(m, "NotAJournal", corrupt).release().ptr();
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const NotAJournal& other) {
      PyErr_SetObject(foreign, message_of(other).ptr());
    } catch (const CorruptJournal& damaged) {
      PyErr_SetObject(corrupt, message_of(damaged).ptr());
    } catch (const TimedOut& timed_out) {
      py::set_error(PyExc_TimeoutError, timed_out.what());
    } catch (const IoError& failed) {
      // Two arguments make Python choose the subclass, FileNotFoundError and so on.
      const auto arguments = py::make_tuple(failed.code, message_of(failed));
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });

  py::class_<Recovery>(m, "Recovery", "What opening a journal found.")
      .def_readonly("end", &Recovery::end)
      .def_readonly("dropped", &Recovery::dropped)
      .def_property_readonly("reason", &recovery_reason);

  py::class_<Rollout>(m, "StoredRollout", "A rollout of a store; its arrays are views.")
      .def_readonly("index", &Rollout::index)
      .def_property_readonly("prompt", [](const Rollout& r) { return r.info.prompt; })
      .def_property_readonly("settings", [](const Rollout& r) { return r.info.settings; })
      .def_property_readonly("seed", [](const Rollout& r) { return r.info.seed; })
      .def_property_readonly("weight_version",
                             [](const Rollout& r) { return r.info.weight_version; })
      .def_property_readonly("finish_reason",
                             [](const Rollout& r) { return name_of(r.info.finish); })
      .def_property_readonly("token_ids", [](const Rollout& r) { return view(r.token_ids); })
      .def_property_readonly("logprobs", [](const Rollout& r) { return view(r.logprobs); });

  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<Store>(m, "EpisodeStore", "Rollouts in a journal.")
      .def(py::init(&open_store), py::arg("path") = py::none(), py::kw_only(),
           py::arg("max_bytes") = std::int64_t{1} << 28, py::arg("capacity") = py::none())
      .def_property_readonly("recovery", &Store::recovery, py::return_value_policy::copy)
      .def("append_prompt", &append_prompt, py::arg("token_ids"))
      .def(
          "append_settings",
          [](Store& store, const py::bytes& settings) {
            const std::string_view bytes = borrowed(settings);
            py::gil_scoped_release release;
            return store.append_settings(bytes.data(), bytes.size());
          },
          py::arg("settings"))
      .def("append", &append, py::arg("prompt"), py::arg("settings"), py::arg("token_ids"),
           py::arg("logprobs"), py::kw_only(), py::arg("finish_reason"), py::arg("seed"),
           py::arg("weight_version"), py::arg("timeout") = py::none())
      .def(
          "annotate",
          [](Store& store, std::int64_t rollout, const py::bytes& note) {
            const std::string_view bytes = borrowed(note);
            py::gil_scoped_release release;
            store.annotate(rollout, bytes.data(), bytes.size());
          },
          py::arg("rollout"), py::arg("note"))
      .def("take", &take, py::arg("n") = 1, py::arg("timeout") = py::none())
      .def("__len__", &Store::size)
      .def("__getitem__", &Store::rollout, py::arg("rollout"))
      .def("__iter__",
           [](const py::object& self) {
             return py::reinterpret_steal<py::object>(PySeqIter_New(self.ptr()));
           })
      .def(
          "prompt", [](Store& store, std::int64_t index) { return view(store.prompt(index)); },
          py::arg("prompt"))
      .def(
          "settings",
          [](Store& store, std::int64_t index) { return bytes_of(store.settings(index)); },
          py::arg("settings"))
      .def(
          "notes",
          [](Store& store, std::int64_t rollout) {
            py::list notes;
            for (const auto& note : store.notes(rollout)) notes.append(bytes_of(note));
            return notes;
          },
          py::arg("rollout"))
      .def("commit", &Store::commit, released)
      .def("close", &Store::close, released)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](Store& store, const py::args&) {
        py::gil_scoped_release release;
        store.close();
      });
}

}  // namespace fastalign
