#include "journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <utility>

#include "invalid_input.h"

namespace fastalign {
namespace {

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the journal is little endian and read where it lies: this machine is not"
#endif

constexpr char kMagic[8] = {'F', 'A', 'J', 'O', 'U', 'R', 'N', 'L'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kAlignment = 8;

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t zero;
  std::uint64_t id;
  std::uint64_t checksum;
};
static_assert(sizeof(Header) == kJournalHeader);

struct EntryHeader {
  std::uint64_t size;
  std::uint32_t kind;
  std::uint32_t zero;
  std::uint64_t payload_checksum;
  std::uint64_t checksum;
};
static_assert(sizeof(EntryHeader) == kEntryHeader);

template <typename T>
T load(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint64_t header_checksum(const Header& header) {
  return xxh64(&header, offsetof(Header, checksum), 0);
}

std::uint64_t entry_checksum(const EntryHeader& header, std::uint64_t id, std::uint64_t offset) {
  return xxh64(&header, offsetof(EntryHeader, checksum), id ^ offset);
}

// Why there is no whole entry at `offset`, which lies inside of the data; null where there is one.
const char* fault_at(const std::uint8_t* data, std::uint64_t size, std::uint64_t offset,
                     std::uint64_t id, EntryHeader& header) {
  const std::uint64_t left = size - offset;
  if (left < kEntryHeader) return "cut short in its header";
  header = load<EntryHeader>(data + offset);
  if (header.checksum != entry_checksum(header, id, offset)) return "its header is damaged";
  if (header.size > left - kEntryHeader) return "cut short in its payload";
  const std::uint8_t* payload = data + offset + kEntryHeader;
  if (header.payload_checksum != xxh64(payload, header.size, 0)) return "its payload is damaged";
  // What has the right checksums and is still none of ours.
  if (header.size % kAlignment != 0) return "its size is no multiple of 8";
  if (header.kind == kMark &&
      (header.size != sizeof offset || load<std::uint64_t>(payload) > offset)) {
    return "it is no mark of a commit";
  }
  return nullptr;
}

// The last mark behind a fault: how far the file was whole when it was written. A mark is found
// wherever it lies, because its checksum is good for its place alone.
std::uint64_t committed_behind(const std::uint8_t* data, std::uint64_t size, std::uint64_t offset,
                               std::uint64_t id) {
  constexpr std::uint64_t mark_size = kEntryHeader + sizeof offset;
  std::uint64_t committed = 0;
  for (offset += kAlignment; offset <= size && size - offset >= mark_size; offset += kAlignment) {
    const auto size_and_kind = load<std::array<std::uint64_t, 2>>(data + offset);
    if (size_and_kind[0] != sizeof offset || size_and_kind[1] != kMark) continue;
    EntryHeader header;
    if (fault_at(data, size, offset, id, header) == nullptr) {
      committed = std::max(committed, load<std::uint64_t>(data + offset + kEntryHeader));
    }
  }
  return committed;
}

std::string at(std::uint64_t offset) {
  return " at byte " + std::to_string(offset);
}

// The folder that the file lies in, wherever links lead.
int open_folder(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(path.c_str(), nullptr),
                                                         &std::free);
  if (real == nullptr) throw IoError(errno, "cannot be found", path);
  const std::string file = real.get();
  const std::string folder = file.substr(0, std::max<std::size_t>(file.rfind('/'), 1));
  const int handle = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (handle < 0) throw IoError(errno, "cannot be opened", folder);
  return handle;
}

// 0, or the errno with which writing stopped.
int write_all(int file, const std::uint8_t* data, std::uint64_t size, std::uint64_t offset) {
  while (size > 0) {
    const ssize_t written = ::pwrite(file, data, size, static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    data += written;
    size -= static_cast<std::uint64_t>(written);
    offset += static_cast<std::uint64_t>(written);
  }
  return 0;
}

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F,
                        kPrime3 = 0x165667B19E3779F9, kPrime4 = 0x85EBCA77C2B2AE63,
                        kPrime5 = 0x27D4EB2F165667C5;

std::uint64_t rotated(std::uint64_t x, int bits) {
  return (x << bits) | (x >> (64 - bits));
}

std::uint64_t mixed(std::uint64_t lane, std::uint64_t word) {
  return rotated(lane + word * kPrime2, 31) * kPrime1;
}

}  // namespace

IoError::IoError(int error, const std::string& what, const std::string& path)
    : std::runtime_error(path + " " + what + ": " + std::strerror(error)), code(error) {}

std::uint64_t xxh64(const void* data, std::size_t size, std::uint64_t seed) {
  const auto* from = static_cast<const std::uint8_t*>(data);
  std::size_t left = size;
  std::uint64_t hash = seed + kPrime5;
  if (left >= 32) {
    std::uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; left >= 32; left -= 32, from += 32) {
      a = mixed(a, load<std::uint64_t>(from));
      b = mixed(b, load<std::uint64_t>(from + 8));
      c = mixed(c, load<std::uint64_t>(from + 16));
      d = mixed(d, load<std::uint64_t>(from + 24));
    }
    hash = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
    for (const std::uint64_t lane : {a, b, c, d}) {
      hash = (hash ^ mixed(0, lane)) * kPrime1 + kPrime4;
    }
  }
  hash += size;
  for (; left >= 8; left -= 8, from += 8) {
    hash = rotated(hash ^ mixed(0, load<std::uint64_t>(from)), 27) * kPrime1 + kPrime4;
  }
  if (left >= 4) {
    hash = rotated(hash ^ load<std::uint32_t>(from) * kPrime1, 23) * kPrime2 + kPrime3;
    left -= 4, from += 4;
  }
  for (; left > 0; --left, ++from) hash = rotated(hash ^ *from * kPrime5, 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

void write_header(std::uint8_t* to, std::uint64_t id) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.id = id;
  header.checksum = header_checksum(header);
  std::memcpy(to, &header, sizeof header);
}

Recovery read_journal(const std::uint8_t* data, std::uint64_t size, const std::string& name,
                      const Visit& visit) {
  Recovery recovery;
  if (size == 0) return recovery;
  Header header{};
  std::memcpy(&header, data, std::min(size, kJournalHeader));
  if (std::memcmp(header.magic, kMagic, std::min<std::uint64_t>(size, sizeof kMagic)) != 0) {
    throw NotAJournal(name + " is no journal: it does not begin as one");
  }
  if (size < kJournalHeader) {
    // Nothing was ever appended to it.
    recovery.dropped = size;
    recovery.reason = "header at byte 0: cut short";
    return recovery;
  }
  // Before the checksum: another version may have another one.
  if (header.version != kVersion) {
    throw CorruptJournal(name + " is a journal of version " + std::to_string(header.version) +
                         "; version " + std::to_string(kVersion) + " is what is read here");
  }
  if (header.checksum != header_checksum(header)) {
    throw CorruptJournal(name + " is damaged: header at byte 0");
  }
  std::uint64_t offset = kJournalHeader;
  recovery.appended = offset;
  const char* fault = nullptr;
  while (offset < size) {
    EntryHeader entry;
    fault = fault_at(data, size, offset, header.id, entry);
    if (fault != nullptr) break;
    const std::uint64_t payload = offset + kEntryHeader;
    if (entry.kind == kMark) {
      recovery.committed = load<std::uint64_t>(data + payload);
    } else {
      visit({payload, entry.kind, data + payload, entry.size});
      recovery.appended = payload + entry.size;
    }
    offset = payload + entry.size;
  }
  recovery.end = offset;
  if (fault != nullptr) {
    const std::uint64_t committed = committed_behind(data, size, offset, header.id);
    if (committed > offset) {
      throw CorruptJournal(name + " is damaged: entry" + at(offset) + ", " + fault +
                           ", but everything before byte " + std::to_string(committed) +
                           " was committed");
    }
    recovery.dropped = size - offset;
    recovery.reason = "entry" + at(offset) + ": " + fault;
  }
  return recovery;
}

Entry::Entry(std::uint32_t kind, std::uint64_t size) {
  const std::uint64_t padded = (size + kAlignment - 1) / kAlignment * kAlignment;
  size_ = kEntryHeader + padded;
  bytes_.reset(new std::uint8_t[size_]);
  std::memset(bytes_.get() + kEntryHeader + size, 0, padded - size);
  EntryHeader header{};
  header.size = padded;
  header.kind = kind;
  std::memcpy(bytes_.get(), &header, sizeof header);
}

void Entry::seal() {
  auto header = load<EntryHeader>(bytes_.get());
  header.payload_checksum = xxh64(payload(), header.size, 0);
  std::memcpy(bytes_.get(), &header, sizeof header);
}

void Entry::place(std::uint64_t id, std::uint64_t offset) {
  auto header = load<EntryHeader>(bytes_.get());
  header.checksum = entry_checksum(header, id, offset);
  std::memcpy(bytes_.get(), &header, sizeof header);
}

Mapping::Mapping(int file, std::uint64_t offset, std::uint64_t size, const std::string& path)
    : offset_(offset), size_(size) {
  // No memory is set aside for pages that nobody is to write to.
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file,
                      static_cast<off_t>(offset));
  if (data == MAP_FAILED) throw IoError(errno, "cannot be mapped", path);
  data_ = static_cast<const std::uint8_t*>(data);
}

Mapping::~Mapping() {
  ::munmap(const_cast<std::uint8_t*>(data_), size_);
}

Journal::Journal(const std::string& path, const Visit& visit)
    : name_(path.empty() ? "the unnamed journal" : path),
      named_(!path.empty()),
      owner_(::getpid()) {
  try {
    open(path);
    struct stat info;
    if (::fstat(file_, &info) != 0) throw IoError(errno, "cannot be read", name_);
    const auto size = static_cast<std::uint64_t>(info.st_size);
    if (size > 0) {
      const Mapping whole(file_, 0, size, name_);
      ::madvise(const_cast<std::uint8_t*>(whole.at(0)), size, MADV_SEQUENTIAL);
      recovery_ = read_journal(whole.at(0), size, name_, visit);
      if (size >= kJournalHeader) id_ = load<std::uint64_t>(whole.at(offsetof(Header, id)));
    }
    if (recovery_.dropped > 0) {
      if (::ftruncate(file_, static_cast<off_t>(recovery_.end)) != 0 || ::fdatasync(file_) != 0) {
        throw IoError(errno, "cannot be cut to what is whole", name_);
      }
    }
    if (recovery_.end == 0) create();
    end_ = std::max(recovery_.end, kJournalHeader);
    appended_ = std::max(recovery_.appended, kJournalHeader);
    // A header alone is nothing that could be lost.
    durable_ = marked_ = std::max(recovery_.committed, kJournalHeader);
    if (named_ && recovery_.committed == 0) folder_ = open_folder(path);
  } catch (...) {
    if (file_ >= 0) ::close(file_);
    throw;
  }
}

Journal::~Journal() {
  if (folder_ >= 0) ::close(folder_);
  ::close(file_);
}

void Journal::open(const std::string& path) {
  if (!named_) {
    const char* folder = std::getenv("TMPDIR");
    std::string made = std::string(folder != nullptr ? folder : "/tmp") + "/fastalign-XXXXXX";
    file_ = ::mkostemp(made.data(), O_CLOEXEC);
    if (file_ < 0) throw IoError(errno, "cannot be made", made);
    ::unlink(made.c_str());
    return;
  }
  file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (file_ < 0) throw IoError(errno, "cannot be opened", path);
  if (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
    throw IoError(errno, errno == EWOULDBLOCK ? "is open already" : "cannot be locked", path);
  }
}

void Journal::create() {
  std::random_device random;
  id_ = (static_cast<std::uint64_t>(random()) << 32) | random();
  std::uint8_t header[kJournalHeader];
  write_header(header, id_);
  if (const int failed = write_all(file_, header, sizeof header, 0)) {
    throw IoError(failed, "cannot be written", name_);
  }
}

bool Journal::owned() const {
  return ::getpid() == owner_;
}

void Journal::check_owned() const {
  if (owned()) return;
  throw InvalidInput("the store is open in process " + std::to_string(owner_) +
                     ", from which this one, " + std::to_string(::getpid()) +
                     ", was forked: it may only read");
}

std::uint64_t Journal::append(Entry& entry) {
  check_owned();
  std::lock_guard lock(mutex_);
  const std::uint64_t offset = write(entry);
  appended_ = end_;
  return offset + kEntryHeader;
}

std::uint64_t Journal::write(Entry& entry) {
  if (closed_) throw InvalidInput("the store is closed");
  if (!broken_.empty()) throw IoError(EIO, broken_, name_);
  entry.place(id_, end_);
  if (const int failed = write_all(file_, entry.bytes(), entry.size(), end_)) {
    if (::ftruncate(file_, static_cast<off_t>(end_)) != 0) {
      broken_ = "ends in an entry that was cut short and cannot be taken back";
    }
    throw IoError(failed, "cannot be written", name_);
  }
  return std::exchange(end_, end_ + entry.size());
}

void Journal::commit() {
  check_owned();
  std::unique_lock lock(mutex_);
  const std::uint64_t wanted = appended_;
  while (marked_ < wanted) {
    if (syncing_) {
      synced_.wait(lock);
      continue;
    }
    const std::uint64_t reached = appended_;
    if (durable_ < reached) {
      if (!broken_.empty()) throw IoError(EIO, broken_, name_);
      syncing_ = true;
      lock.unlock();
      const int failed = named_ ? sync() : 0;
      lock.lock();
      syncing_ = false;
      synced_.notify_all();
      if (failed != 0) {
        broken_ = "could not be synced, so that what was written last may be lost";
        throw IoError(failed, "cannot be synced", name_);
      }
      durable_ = reached;
    }
    Entry mark(kMark, sizeof durable_);
    std::memcpy(mark.payload(), &durable_, sizeof durable_);
    mark.seal();
    write(mark);
    marked_ = durable_;
  }
}

// The file, and once its folder; 0, or the errno with which that failed.
int Journal::sync() {
  if (::fdatasync(file_) != 0) return errno;
  if (folder_ < 0) return 0;
  if (::fsync(folder_) != 0) return errno;
  ::close(std::exchange(folder_, -1));
  return 0;
}

void Journal::close() {
  if (!owned()) return;  // the lock is not this process's to give up
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
  }
  std::exception_ptr failed;
  try {
    commit();
  } catch (...) {
    failed = std::current_exception();
  }
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    if (named_) ::flock(file_, LOCK_UN);
  }
  if (failed) std::rethrow_exception(failed);
}

std::shared_ptr<const Mapping> Journal::map(std::uint64_t offset, std::uint64_t size) const {
  return std::make_shared<const Mapping>(file_, offset, size, name_);
}

bool Journal::shows(const Mapping& mapping, std::uint64_t offset) const {
  const auto header = load<EntryHeader>(mapping.at(offset));
  return header.checksum == entry_checksum(header, id_, offset);
}

}  // namespace fastalign
