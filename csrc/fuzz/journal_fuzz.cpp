// Fuzz target of the journal's reader and of the store's index: `make fuzz`.
//
// An input's first byte chooses how the rest is read. Even: as a file, as it is. Odd: as a recipe
// of one, because hardly any mutation of a file keeps its checksums right: the number of damages,
// the damages (position, xor), and then entries (kind, length, payload).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "invalid_input.h"
#include "journal.h"
#include "store.h"

namespace {

using namespace fastalign;
using Bytes = std::vector<std::uint8_t>;

#define MUST(condition)                                                    \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

// Takes numbers off an input; 0 once it is at its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  std::size_t left() const { return left_; }
  std::uint32_t byte() { return left_ == 0 ? 0 : (--left_, *data_++); }
  std::uint32_t word() { return byte() | byte() << 8; }
  void copy(std::uint8_t* to, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) to[i] = static_cast<std::uint8_t>(byte());
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

Bytes made(Input input) {
  constexpr std::uint64_t id = 42;
  Bytes file(kJournalHeader);
  write_header(file.data(), id);
  std::vector<std::pair<std::uint32_t, std::uint8_t>> damages(input.byte() % 4);
  for (auto& [position, change] : damages) {
    position = input.word();
    change = static_cast<std::uint8_t>(input.byte());
  }
  while (input.left() > 0) {
    Entry entry(input.byte(), input.byte());
    input.copy(entry.payload(), entry.size() - kEntryHeader);
    entry.seal();
    entry.place(id, file.size());
    file.insert(file.end(), entry.bytes(), entry.bytes() + entry.size());
  }
  for (const auto& [position, change] : damages) {
    // Without a change the file ends there.
    if (change == 0) file.resize(position % (file.size() + 1));
    if (!file.empty()) file[position % file.size()] ^= change;
  }
  return file;
}

struct Read {
  Index index;
  Recovery recovery;
  std::size_t entries = 0;
};

// Reads a file and checks what holds for every one; throws what the reader throws.
Read read(const Bytes& file) {
  Read read;
  std::uint64_t end = kJournalHeader;
  std::uint64_t sum = 0;
  read.recovery = read_journal(file.data(), file.size(), "j", [&](const EntryView& entry) {
    // In order, and in the file; the sanitizer says so for its bytes.
    MUST(entry.offset >= end + kEntryHeader && entry.kind != kMark);
    MUST(entry.payload == file.data() + entry.offset && entry.size % 8 == 0);
    for (std::uint64_t i = 0; i < entry.size; ++i) sum += entry.payload[i];
    end = entry.offset + entry.size;
    ++read.entries;
    read.index.add(entry);
  });
  volatile std::uint64_t sink = sum;
  (void)sink;
  const Recovery& found = read.recovery;
  MUST(found.end + found.dropped == file.size() && found.committed <= found.end);
  MUST(found.reason.empty() == (found.dropped == 0));
  MUST(end <= found.end || found.end == 0);
  MUST(found.appended == (found.end == 0 ? 0 : end));
  return read;
}

void check_places(const Index& index, std::uint64_t end) {
  const auto lies_in_it = [&](const Index::Place& place, std::uint64_t size) {
    MUST(place.offset % 4 == 0 && place.offset <= end);
    MUST(place.length <= (end - place.offset) / size);
  };
  for (const auto& place : index.prompts) lies_in_it(place, 4);
  for (const auto& place : index.settings) lies_in_it(place, 1);
  for (const auto& rollout : index.rollouts) {
    lies_in_it(rollout.tokens, 8);
    index.check(rollout.info);
  }
  for (const auto& [rollout, places] : index.notes) {
    index.check_rollout(rollout);
    for (const auto& place : places) lies_in_it(place, 1);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const bool recipe = input.byte() % 2 == 1;
  Bytes file = recipe ? made(input) : Bytes(data + (size > 0 ? 1 : 0), data + size);
  file.shrink_to_fit();
  try {
    const Read whole = read(file);
    check_places(whole.index, whole.recovery.end);
    // What was kept is a journal without anything to drop, and so is every cut of it but for the
    // entry that was cut.
    file.resize(whole.recovery.end);
    const Read kept = read(file);
    MUST(kept.entries == whole.entries && kept.recovery.dropped == 0);
    file.resize(whole.recovery.end / 2);
    file.shrink_to_fit();
    const Read half = read(file);
    MUST(half.entries <= kept.entries);
  } catch (const CorruptJournal& corrupt) {
    MUST(std::strchr(corrupt.what(), '\n') == nullptr);
  } catch (const InvalidInput& invalid) {
    MUST(std::strchr(invalid.what(), '\n') == nullptr);
  }
  return 0;
}
