#pragma once

#include <stdexcept>
#include <string>

namespace fastalign {

// What the caller handed in is wrong; the message is one line that names the argument, its index
// and its value.
class InvalidInput : public std::invalid_argument {
 public:
  explicit InvalidInput(const std::string& message) : std::invalid_argument(message) {}
};

// "name[index]", as messages name an element.
inline std::string item(const char* name, std::size_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

}  // namespace fastalign
