#include "journal.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "invalid_input.h"
#include "temporary.h"

namespace {

// How often something was synced, and whether that fails.
std::atomic<int> file_syncs{0}, folder_syncs{0};
std::atomic<bool> syncs_fail{false};

int synced(int file, long call) {
  struct stat info{};
  ::fstat(file, &info);
  ++(S_ISDIR(info.st_mode) ? folder_syncs : file_syncs);
  if (!syncs_fail) return static_cast<int>(::syscall(call, file));
  errno = EIO;
  return -1;
}

}  // namespace

// In place of the C library's.
extern "C" int fsync(int file) {
  return synced(file, SYS_fsync);
}
extern "C" int fdatasync(int file) {
  return synced(file, SYS_fdatasync);
}

namespace {

using fastalign::CorruptJournal;
using fastalign::Entry;
using fastalign::EntryView;
using fastalign::InvalidInput;
using fastalign::IoError;
using fastalign::Journal;
using fastalign::Recovery;
using fastalign::tests::Bytes;
using fastalign::tests::TemporaryFile;
using Entries = std::vector<std::pair<std::uint32_t, Bytes>>;

void ignore(const EntryView&) {}

std::uint64_t append(Journal& journal, std::uint32_t kind, const Bytes& payload) {
  Entry entry(kind, payload.size());
  if (!payload.empty()) std::memcpy(entry.payload(), payload.data(), payload.size());
  entry.seal();
  return journal.append(entry);
}

// Payloads as they come back: padded to a multiple of 8.
Bytes padded(Bytes payload) {
  payload.resize((payload.size() + 7) / 8 * 8);
  return payload;
}

Entries read(const Bytes& bytes, Recovery* recovery = nullptr) {
  Entries entries;
  const Recovery found =
      fastalign::read_journal(bytes.data(), bytes.size(), "j", [&](const EntryView& entry) {
        entries.emplace_back(entry.kind, Bytes(entry.payload, entry.payload + entry.size));
      });
  if (recovery != nullptr) *recovery = found;
  return entries;
}

const Entries kWritten{
    {1, padded({1, 2, 3})}, {2, {}}, {1, padded(Bytes(40, 7))}, {9, Bytes(8, 0)}};

// A journal of these entries with commits after some; also where each entry ends.
Bytes written(const std::vector<std::size_t>& commits, std::vector<std::uint64_t>* ends = nullptr) {
  const TemporaryFile file;
  Journal journal(file.path(), ignore);
  for (std::size_t i = 0; i < kWritten.size(); ++i) {
    const std::uint64_t payload = append(journal, kWritten[i].first, kWritten[i].second);
    if (ends != nullptr) ends->push_back(payload + kWritten[i].second.size());
    for (const std::size_t after : commits) {
      if (after == i) journal.commit();
    }
  }
  return file.read();
}

TEST(hashes_as_the_specification_says) {
  CHECK(fastalign::xxh64("", 0, 0) == 0xEF46DB3751D8E999);
  CHECK(fastalign::xxh64("a", 1, 0) == 0xD24EC4F1A98C6E5B);
  CHECK(fastalign::xxh64("abc", 3, 0) == 0x44BC2CF5AD770999);
  const std::string longer = "Nobody inspects the spammish repetition";
  CHECK(fastalign::xxh64(longer.data(), longer.size(), 0) == 0xFBCEA83C8A378BF1);
}

TEST(reads_back_what_was_appended) {
  const TemporaryFile file;
  {
    Journal journal(file.path(), ignore);
    CHECK(append(journal, 1, {5}) == fastalign::kJournalHeader + fastalign::kEntryHeader);
  }
  Entries entries;
  const auto visit = [&](const EntryView& entry) {
    entries.emplace_back(entry.kind, Bytes(entry.payload, entry.payload + entry.size));
  };
  {
    Journal journal(file.path(), visit);
    append(journal, 2, {6});
    journal.close();
  }
  entries.clear();
  const Journal journal(file.path(), visit);
  CHECK((entries == Entries{{1, padded({5})}, {2, padded({6})}}));
  CHECK(journal.recovery().dropped == 0 && journal.recovery().reason.empty());
}

TEST(keeps_every_whole_entry_wherever_the_file_is_cut) {
  std::vector<std::uint64_t> ends;
  const Bytes whole = written({0, 2}, &ends);
  for (std::uint64_t size = 0; size <= whole.size(); ++size) {
    const TemporaryFile file;
    file.write(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)));
    Entries expected;
    for (std::size_t i = 0; i < ends.size() && ends[i] <= size; ++i)
      expected.push_back(kWritten[i]);
    Recovery recovery;
    CHECK(read(file.read(), &recovery) == expected);
    CHECK(recovery.end + recovery.dropped == size);
    CHECK(recovery.reason.empty() == (recovery.dropped == 0));
    // What is appended after the cut is read behind what was kept.
    {
      Journal journal(file.path(), ignore);
      append(journal, 5, {1});
    }
    expected.emplace_back(5, padded({1}));
    CHECK(read(file.read(), &recovery) == expected);
    CHECK(recovery.dropped == 0);
  }
}

TEST(finds_every_flipped_bit) {
  std::vector<std::uint64_t> ends;
  const Bytes whole = written({1, 3}, &ends);
  const std::uint64_t committed = ends.back();
  for (std::size_t byte = 0; byte < whole.size(); ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes damaged = whole;
      damaged[byte] = static_cast<std::uint8_t>(damaged[byte] ^ (1 << bit));
      if (byte < committed) {
        const std::string message = MESSAGE_OF(CorruptJournal, read(damaged));
        CHECK(message.find('\n') == std::string::npos);
      } else {
        // The mark itself: what it stands for is there all the same.
        Recovery recovery;
        CHECK(read(damaged, &recovery) == kWritten);
        CHECK(recovery.end == committed && recovery.dropped == whole.size() - committed);
      }
    }
  }
}

TEST(says_where_damage_is_and_leaves_the_file_alone) {
  std::vector<std::uint64_t> ends;
  Bytes bytes = written({3}, &ends);
  bytes[ends[0] - 1] ^= 1;
  const TemporaryFile file;
  file.write(bytes);
  CHECK(MESSAGE_OF(CorruptJournal, Journal(file.path(), ignore)) ==
        file.path() +
            " is damaged: entry at byte 32, its payload is damaged, but everything "
            "before byte " +
            std::to_string(ends[3]) + " was committed");
  CHECK(file.read() == bytes);
}

TEST(drops_and_reports_what_was_never_committed) {
  std::vector<std::uint64_t> ends;
  Bytes bytes = written({0}, &ends);
  bytes[ends[2] - 1] ^= 1;
  Recovery recovery;
  CHECK((read(bytes, &recovery) == Entries{kWritten[0], kWritten[1]}));
  CHECK(recovery.end == ends[1] && recovery.dropped == bytes.size() - ends[1]);
  CHECK(recovery.reason == "entry at byte " + std::to_string(ends[1]) + ": its payload is damaged");
}

TEST(takes_no_bytes_of_another_journal_for_its_own) {
  const Bytes inner = written({0, 3});
  const TemporaryFile file;
  {
    Journal journal(file.path(), ignore);
    append(journal, 1, inner);
  }
  Bytes bytes = file.read();
  // Its header: the reader then looks through the payload for a mark.
  bytes[fastalign::kJournalHeader] ^= 1;
  Recovery recovery;
  CHECK(read(bytes, &recovery).empty());
  CHECK(recovery.end == fastalign::kJournalHeader);
}

TEST(refuses_what_is_no_journal_of_this_version) {
  Bytes bytes = written({});
  bytes[8] = 7;
  CHECK(MESSAGE_OF(CorruptJournal, read(bytes)) ==
        "j is a journal of version 7; version 1 is what is read here");
  bytes[0] = 'X';
  CHECK(MESSAGE_OF(CorruptJournal, read(bytes)) == "j is no journal: it does not begin as one");
  CHECK(MESSAGE_OF(CorruptJournal, read({'h', 'i'})) ==
        "j is no journal: it does not begin as one");
}

TEST(is_open_once_at_a_time) {
  const TemporaryFile file;
  Journal journal(file.path(), ignore);
  const std::string message = MESSAGE_OF(IoError, Journal(file.path(), ignore));
  CHECK(message.find(file.path() + " is open already") == 0);
  journal.close();
  const Journal next(file.path(), ignore);
}

// The disk is full `left` bytes further on.
class FullDisk {
 public:
  FullDisk(const TemporaryFile& file, std::uint64_t left) {
    std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    rlimit full = before_;
    full.rlim_cur = file.read().size() + left;
    ::setrlimit(RLIMIT_FSIZE, &full);
  }
  ~FullDisk() { ::setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

TEST(takes_back_a_write_that_failed) {
  const TemporaryFile file;
  Journal journal(file.path(), ignore);
  append(journal, 1, {1});
  {
    const FullDisk full(file, 100);
    CHECK(MESSAGE_OF(IoError, append(journal, 2, Bytes(4096, 2))) ==
          file.path() + " cannot be written: " + std::strerror(EFBIG));
  }
  append(journal, 3, {3});
  journal.commit();
  Recovery recovery;
  CHECK((read(file.read(), &recovery) == Entries{{1, padded({1})}, {3, padded({3})}}));
  CHECK(recovery.dropped == 0);
}

TEST(writes_a_mark_for_which_there_was_no_room_later) {
  const TemporaryFile file;
  Journal journal(file.path(), ignore);
  append(journal, 1, {1});
  {
    const FullDisk full(file, 39);
    CHECK(MESSAGE_OF(IoError, journal.commit()) ==
          file.path() + " cannot be written: " + std::strerror(EFBIG));
  }
  const int before = file_syncs;
  journal.commit();
  CHECK(file_syncs == before);
  Recovery recovery;
  CHECK((read(file.read(), &recovery) == Entries{{1, padded({1})}}));
  CHECK(recovery.committed == recovery.appended && recovery.dropped == 0);
}

TEST(gives_the_lock_up_whatever_fails) {
  for (const bool full_disk : {true, false}) {
    const TemporaryFile file;
    Journal journal(file.path(), ignore);
    append(journal, 1, {1});
    {
      const FullDisk full(file, full_disk ? 39 : 4096);
      syncs_fail = !full_disk;
      const std::string message = MESSAGE_OF(IoError, journal.close());
      syncs_fail = false;
      CHECK(message.find(full_disk ? "cannot be written" : "cannot be synced") != message.npos);
      journal.close();
    }
    const Bytes before = file.read();
    const Journal next(file.path(), ignore);
    // It is the next one's to write to.
    CHECK(MESSAGE_OF(InvalidInput, append(journal, 1, {2})) == "the store is closed");
    MESSAGE_OF(std::exception, journal.commit());
    CHECK(file.read() == before);
  }
}

TEST(syncs_the_folder_until_a_commit_has) {
  const TemporaryFile file;
  const int before = folder_syncs;
  {
    Journal journal(file.path(), ignore);
    append(journal, 1, {1});
  }
  // As if its writer had died before it committed.
  CHECK(folder_syncs == before);
  Journal journal(file.path(), ignore);
  journal.commit();
  CHECK(folder_syncs == before + 1);
  append(journal, 1, {1});
  journal.close();
  Journal again(file.path(), ignore);
  append(again, 1, {1});
  again.commit();
  CHECK(folder_syncs == before + 1);
}

TEST(finds_the_folder_behind_a_link) {
  const TemporaryFile file, link;
  file.write({});
  CHECK(::symlink(file.path().c_str(), link.path().c_str()) == 0);
  const int before = folder_syncs;
  Journal journal(link.path(), ignore);
  append(journal, 1, {1});
  journal.commit();
  CHECK(folder_syncs == before + 1);
}

TEST(opening_and_closing_adds_nothing) {
  for (const bool empty : {true, false}) {
    const TemporaryFile file;
    {
      Journal journal(file.path(), ignore);
      if (!empty) append(journal, 1, {1});
      journal.close();
    }
    const Bytes before = file.read();
    CHECK(before.size() == (empty ? 32 : 32 + 40 + 40));
    const int syncs = file_syncs + folder_syncs;
    for (int i = 0; i < 3; ++i) {
      Journal journal(file.path(), ignore);
      journal.commit();
      journal.close();
    }
    CHECK(file.read() == before && file_syncs + folder_syncs == syncs);
  }
}

TEST(commits_from_many_threads) {
  const TemporaryFile file;
  Journal journal(file.path(), ignore);
  std::vector<std::thread> threads;
  for (std::uint8_t t = 0; t < 4; ++t) {
    threads.emplace_back([&journal, t] {
      for (std::uint8_t i = 0; i < 20; ++i) {
        append(journal, 1 + std::uint32_t{t}, Bytes(i, t));
        journal.commit();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Recovery recovery;
  const Entries entries = read(file.read(), &recovery);
  CHECK(entries.size() == 80 && recovery.dropped == 0);
  std::vector<std::uint8_t> seen(4);
  std::uint64_t end = fastalign::kJournalHeader;
  for (const auto& [kind, payload] : entries) {
    CHECK(payload == padded(Bytes(seen[kind - 1]++, static_cast<std::uint8_t>(kind - 1))));
  }
  // The last mark covers the last entry.
  const Bytes bytes = file.read();
  fastalign::read_journal(bytes.data(), bytes.size(), "j",
                          [&](const EntryView& entry) { end = entry.offset + entry.size; });
  CHECK(recovery.committed == end);
}

TEST(needs_no_name) {
  Journal journal("", ignore);
  const std::uint64_t offset = append(journal, 1, {42});
  CHECK(*journal.map(0, 4096)->at(offset) == 42);
  journal.commit();
}

}  // namespace
