// An append-only file of checksummed entries that outlives its writer, killed at any byte.
//
// All numbers are little endian. The file begins with a header of 32 bytes: the magic, the version,
// a random id, and the checksum of these. Each entry begins with 32 bytes too: the size of its
// payload (a multiple of 8), its kind, the checksum of the payload, and that of these numbers,
// seeded by the file's id and the entry's offset, so that no bytes from elsewhere pass for an
// entry. Everything is aligned to 8 bytes, so that a mapping of the file is read as it lies there.
//
// A commit syncs the file, the first one its folder too, and then appends a mark that says up to
// where; a mark is the proof that what is before it was whole once. So damage before the last mark
// is told from a tail that was being written when the writer died, or that a power failure took.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fastalign {

// The file cannot be what a journal of this version is; nothing in it was changed. One line that
// names the file and the offset.
class CorruptJournal : public std::runtime_error {
 public:
  explicit CorruptJournal(const std::string& message) : std::runtime_error(message) {}
};

// It does not even begin as a journal: a file of something else.
class NotAJournal : public CorruptJournal {
 public:
  using CorruptJournal::CorruptJournal;
};

// The operating system refused; code is its errno.
class IoError : public std::runtime_error {
 public:
  IoError(int code, const std::string& what, const std::string& path);
  int code;
};

// XXH64, the 64-bit hash of the xxHash specification.
std::uint64_t xxh64(const void* data, std::size_t size, std::uint64_t seed);

constexpr std::uint64_t kJournalHeader = 32;
constexpr std::uint64_t kEntryHeader = 32;
// The journal's own entries; all other kinds are its user's.
constexpr std::uint32_t kMark = 0;

// An entry that was read: its payload lies in the bytes that were given to read_journal.
struct EntryView {
  std::uint64_t offset;  // of the payload in the file
  std::uint32_t kind;
  const std::uint8_t* payload;
  std::uint64_t size;  // of the payload in bytes, a multiple of 8
};

using Visit = std::function<void(const EntryView&)>;

// What reading found: whole entries up to `end`, and `dropped` bytes behind it that were never
// committed, with the reason why they are none; empty where nothing was dropped.
struct Recovery {
  std::uint64_t end = 0;
  std::uint64_t dropped = 0;
  std::string reason;
  std::uint64_t appended = 0;   // end of the last entry that is no mark
  std::uint64_t committed = 0;  // entries before this offset are known to be on the disk
};

// Visits every entry of a journal but the marks, in order, until the first that is not whole.
// Throws NotAJournal, and CorruptJournal where this is one of another version or damaged before its
// last mark; `name` is what the message calls it. Reads nothing outside of the bytes given.
Recovery read_journal(const std::uint8_t* data, std::uint64_t size, const std::string& name,
                      const Visit& visit);

// Writes the header of a journal to 32 bytes.
void write_header(std::uint8_t* header, std::uint64_t id);

// An entry to be appended; its payload is the caller's to fill, all but the padding up to a
// multiple of 8, which is 0.
class Entry {
 public:
  Entry(std::uint32_t kind, std::uint64_t size);
  std::uint8_t* payload() { return bytes_.get() + kEntryHeader; }
  // Writes the part of its header that does not depend on where it will stand. Call it last.
  void seal();
  // Writes the rest; the entry is then ready for this place in that file.
  void place(std::uint64_t id, std::uint64_t offset);

  const std::uint8_t* bytes() const { return bytes_.get(); }
  std::uint64_t size() const { return size_; }  // with its header

 private:
  std::uint64_t size_;
  std::unique_ptr<std::uint8_t[]> bytes_;
};

// A part of a file in memory, which may reach beyond its end. It is copy-on-write: who writes to it
// all the same, as torch lets one do with a read-only array, changes a page of this mapping, which
// from then on no longer follows the file, and never the file.
class Mapping {
 public:
  Mapping(int file, std::uint64_t offset, std::uint64_t size, const std::string& path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const std::uint8_t* at(std::uint64_t offset) const { return data_ + (offset - offset_); }
  std::uint64_t size() const { return size_; }

 private:
  std::uint64_t offset_, size_;
  const std::uint8_t* data_;
};

// The file. Any number of threads may call it at the same time. A process that was forked from the
// one that opened it may map what is there, and nothing else: two would write to the same place.
class Journal {
 public:
  // Opens or makes the file at `path`, takes its lock, visits what it holds, and cuts off what
  // read_journal drops. An empty path means a file without a name, for this object alone.
  // Throws IoError, also where another process has the file open, and CorruptJournal.
  Journal(const std::string& path, const Visit& visit);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  const Recovery& recovery() const { return recovery_; }

  // Whether this is the process that opened it.
  bool owned() const;
  // Throws InvalidInput where it is not.
  void check_owned() const;

  // Appends a sealed entry and returns the offset of its payload. Once it returns, the entry
  // survives the process. A write that fails leaves the file as it was.
  std::uint64_t append(Entry& entry);

  // Returns once everything appended before is on the disk, whatever then happens to the machine,
  // and marked so; where all of it was already, nothing is written. Calls at the same time share a
  // sync. After a sync that failed nothing is written any more: what the kernel could not write it
  // does not try again. A mark that cannot be written is written by the next commit.
  void commit();

  // Commits and gives the lock up, also where the commit fails; nothing can be appended any more,
  // and what was can still be mapped. A second call does nothing.
  void close();

  std::shared_ptr<const Mapping> map(std::uint64_t offset, std::uint64_t size) const;
  // Whether a mapping shows the entry at `offset`, which lies in it. It does not where somebody
  // wrote to the page before the entry came.
  bool shows(const Mapping& mapping, std::uint64_t offset) const;

 private:
  void open(const std::string& path);
  void create();
  std::uint64_t write(Entry& entry);
  int sync();

  std::string name_;
  bool named_;
  pid_t owner_;
  int file_ = -1;
  int folder_ = -1;  // until it is synced: after a power failure it may not know of a new file
  std::uint64_t id_ = 0;
  Recovery recovery_;

  std::mutex mutex_;
  std::condition_variable synced_;
  std::uint64_t end_ = 0;       // where the next entry goes
  std::uint64_t appended_ = 0;  // end of the last entry that is no mark
  std::uint64_t durable_ = 0;   // what is before this is on the disk
  std::uint64_t marked_ = 0;    // and what is before this has a mark that says so
  bool syncing_ = false;
  bool closed_ = false;
  std::string broken_;  // why nothing can be written any more
};

}  // namespace fastalign
