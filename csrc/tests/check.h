// Checks for the tests of the core: each test is a function, and main runs what TEST registered.
#pragma once

#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace fastalign::tests {

using Test = std::pair<const char*, void (*)()>;

inline std::vector<Test>& registered() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, void (*run)()) { registered().emplace_back(name, run); }
};

class Failure : public std::exception {
 public:
  Failure(const char* file, int line, const std::string& what)
      : message_(std::string(file) + ":" + std::to_string(line) + ": " + what) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// The message of the Error that `call` throws; fails where it throws none.
template <typename Error, typename Call>
std::string message_of(const char* file, int line, Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  throw Failure(file, line, "nothing was thrown");
}

}  // namespace fastalign::tests

#define TEST(name)                                                             \
  static void name();                                                          \
  static const fastalign::tests::Registration name##_registered(#name, &name); \
  static void name()

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) throw fastalign::tests::Failure(__FILE__, __LINE__, #condition); \
  } while (false)

#define MESSAGE_OF(Error, expression) \
  fastalign::tests::message_of<Error>(__FILE__, __LINE__, [&] { (void)(expression); })

int main() {
  int failed = 0;
  for (const auto& [name, run] : fastalign::tests::registered()) {
    try {
      run();
      std::printf("passed  %s\n", name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED  %s: %s\n", name, error.what());
    }
  }
  return failed == 0 ? 0 : 1;
}
