// A path in a folder of its own, which goes with it.
#pragma once

#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace fastalign::tests {

using Bytes = std::vector<std::uint8_t>;

class TemporaryFile {
 public:
  TemporaryFile() {
    std::string folder = std::filesystem::temp_directory_path() / "fastalign-XXXXXX";
    if (::mkdtemp(folder.data()) == nullptr) throw std::runtime_error(folder);
    folder_ = folder;
  }
  ~TemporaryFile() { std::filesystem::remove_all(folder_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  std::string path() const { return folder_ / "journal"; }
  Bytes read() const {
    std::ifstream file(path(), std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), {});
  }
  void write(const Bytes& bytes) const {
    std::ofstream file(path(), std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }

 private:
  std::filesystem::path folder_;
};

}  // namespace fastalign::tests
