#include "store.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

#include "invalid_input.h"

namespace fastalign {
namespace {

enum Kind : std::uint32_t { kPrompt = 1, kSettings = 2, kRollout = 3, kNote = 4 };

// How the payloads begin. Behind them lie the elements: tokens, bytes, tokens and log-probs, bytes.
struct ListHeader {
  std::uint64_t length;
};
struct NoteHeader {
  std::int64_t rollout;
  std::uint64_t length;
};
struct RolloutHeader {
  RolloutInfo info;
  std::uint32_t length;
};
static_assert(sizeof(RolloutInfo) == 40 && sizeof(RolloutHeader) == 48);

constexpr std::size_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
constexpr std::chrono::milliseconds kSlice{50};

std::string refers_to(const char* name, std::int64_t index, std::size_t count) {
  return std::string(name) + " " + std::to_string(index) + " is not in the store, which has " +
         std::to_string(count);
}

bool within(std::int64_t index, std::size_t count) {
  return index >= 0 && static_cast<std::uint64_t>(index) < count;
}

template <typename T>
const T& element(const std::vector<T>& values, std::int64_t index, const char* name) {
  if (!within(index, values.size())) throw std::out_of_range(refers_to(name, index, values.size()));
  return values[static_cast<std::size_t>(index)];
}

// The header of a payload that must hold `length` elements of `size` bytes behind it.
template <typename Header>
Header opened(const EntryView& entry, std::uint64_t size) {
  Header header;
  if (entry.size < sizeof header) throw InvalidInput("is shorter than its header");
  std::memcpy(&header, entry.payload, sizeof header);
  const std::uint64_t left = entry.size - sizeof header;
  // All that may be beside the elements is padding.
  if (header.length > left / size || left - header.length * size >= 8) {
    throw InvalidInput("has another length than it says");
  }
  return header;
}

void check_tokens(const std::int32_t* token_ids, std::size_t length) {
  for (std::size_t i = 0; i < length; ++i) {
    if (token_ids[i] < 0) {
      throw InvalidInput(item("token_ids", i) + " is " + std::to_string(token_ids[i]) +
                         "; token ids are not negative");
    }
  }
}

template <typename Header>
Entry filled(Kind kind, Header header, const void* elements, std::size_t bytes) {
  Entry entry(kind, sizeof header + bytes);
  std::memcpy(entry.payload(), &header, sizeof header);
  if (bytes > 0) std::memcpy(entry.payload() + sizeof header, elements, bytes);
  entry.seal();
  return entry;
}

std::uint32_t checked_length(std::size_t length) {
  if (length > kMaxTokens) {
    throw InvalidInput("token_ids has " + std::to_string(length) + " tokens, more than " +
                       std::to_string(kMaxTokens));
  }
  return static_cast<std::uint32_t>(length);
}

}  // namespace

NewRollout::NewRollout(const RolloutInfo& info, std::size_t length)
    : info_(info),
      length_(checked_length(length)),
      entry_(kRollout, sizeof(RolloutHeader) + length * (sizeof(std::int32_t) + sizeof(float))) {
  RolloutHeader header{};
  header.info = info;
  header.length = length_;
  std::memcpy(entry_.payload(), &header, sizeof header);
}

std::int32_t* NewRollout::token_ids() {
  return reinterpret_cast<std::int32_t*>(entry_.payload() + sizeof(RolloutHeader));
}

float* NewRollout::logprobs() {
  return reinterpret_cast<float*>(token_ids() + length_);
}

Windows::Windows(const Journal& journal, std::uint64_t max_bytes)
    : journal_(journal), max_bytes_(max_bytes) {}

std::shared_ptr<const Mapping> Windows::find(std::uint64_t offset, std::uint64_t size) {
  // A mapping is two windows long, so that what begins in one and is no longer lies in one piece.
  // Larger things are rare and have a mapping of their own, for as long as it is held.
  if (size > kWindow) {
    constexpr std::uint64_t page = 1 << 16;  // at least, on every machine
    const std::uint64_t start = offset / page * page;
    return journal_.map(start, offset + size - start);
  }
  const std::uint64_t number = offset / kWindow;
  const auto found = known_.find(number);
  auto mapping = found == known_.end() ? nullptr : found->second.lock();
  if (mapping == nullptr || !journal_.shows(*mapping, offset)) mapping = map(number);
  keep(number, mapping);
  return mapping;
}

std::shared_ptr<const Mapping> Windows::map(std::uint64_t number) {
  for (auto it = known_.begin(); it != known_.end();) {
    it = it->second.expired() ? known_.erase(it) : std::next(it);
  }
  auto mapping = journal_.map(number * kWindow, 2 * kWindow);
  known_[number] = mapping;
  return mapping;
}

// Keeps it as the last one used, and drops the oldest of what is too much.
void Windows::keep(std::uint64_t number, const std::shared_ptr<const Mapping>& mapping) {
  Kept& kept = kept_[number];
  if (kept.mapping == nullptr) kept_bytes_ += mapping->size();
  kept = {mapping, ++uses_};
  while (kept_bytes_ > max_bytes_) {
    const auto oldest = std::min_element(
        kept_.begin(), kept_.end(),
        [](const auto& a, const auto& b) { return a.second.used < b.second.used; });
    kept_bytes_ -= oldest->second.mapping->size();
    kept_.erase(oldest);
  }
}

void Index::check(const RolloutInfo& info) const {
  if (!within(info.prompt, prompts.size())) {
    throw InvalidInput(refers_to("prompt", info.prompt, prompts.size()));
  }
  if (!within(info.settings, settings.size())) {
    throw InvalidInput(refers_to("settings", info.settings, settings.size()));
  }
  if (info.finish != Finish::stop && info.finish != Finish::length) {
    throw InvalidInput("finish is " + std::to_string(static_cast<std::uint32_t>(info.finish)));
  }
}

void Index::check_rollout(std::int64_t rollout) const {
  if (!within(rollout, rollouts.size())) {
    throw InvalidInput(refers_to("rollout", rollout, rollouts.size()));
  }
}

void Index::add(const EntryView& entry) {
  switch (entry.kind) {
    case kPrompt: {
      const auto header = opened<ListHeader>(entry, sizeof(std::int32_t));
      prompts.push_back({entry.offset + sizeof header, header.length});
      return;
    }
    case kSettings: {
      const auto header = opened<ListHeader>(entry, 1);
      settings.push_back({entry.offset + sizeof header, header.length});
      return;
    }
    case kRollout: {
      const auto header = opened<RolloutHeader>(entry, sizeof(std::int32_t) + sizeof(float));
      check(header.info);
      rollouts.push_back({header.info, {entry.offset + sizeof header, header.length}});
      return;
    }
    case kNote: {
      const auto header = opened<NoteHeader>(entry, 1);
      check_rollout(header.rollout);
      notes[header.rollout].push_back({entry.offset + sizeof header, header.length});
      return;
    }
    default:
      throw InvalidInput("is of the unknown kind " + std::to_string(entry.kind));
  }
}

Store::Store(const std::string& path, std::uint64_t max_bytes, std::size_t capacity)
    : journal_(path,
               [this, &path](const EntryView& entry) {
                 try {
                   index_.add(entry);
                 } catch (const InvalidInput& invalid) {
                   throw CorruptJournal(path + " is no store of rollouts: entry at byte " +
                                        std::to_string(entry.offset - kEntryHeader) + " " +
                                        invalid.what());
                 }
               }),
      capacity_(capacity),
      windows_(journal_, max_bytes) {
  for (std::size_t i = 0; i < index_.rollouts.size(); ++i) {
    waiting_.push_back(static_cast<std::int64_t>(i));
  }
}

void Store::check_open() const {
  if (closed_) throw InvalidInput("the store is closed");
}

// Appends an entry that is checked already and, before anything else is appended, has `publish`
// enter it into the index.
std::int64_t Store::write(Entry& entry, const std::function<std::int64_t(std::uint64_t)>& publish) {
  // First of all: who forked may have held a lock that nobody gives back here.
  journal_.check_owned();
  std::lock_guard appending(appending_);
  {
    std::lock_guard lock(mutex_);
    check_open();
  }
  // Readers need not wait for the file.
  const std::uint64_t offset = journal_.append(entry);
  std::lock_guard lock(mutex_);
  return publish(offset);
}

std::int64_t Store::append_prompt(const std::int32_t* token_ids, std::size_t length) {
  checked_length(length);
  Entry entry = filled(kPrompt, ListHeader{length}, token_ids, length * sizeof *token_ids);
  // The copy, which nobody else can change.
  check_tokens(reinterpret_cast<const std::int32_t*>(entry.payload() + sizeof(ListHeader)), length);
  return write(entry, [&](std::uint64_t offset) {
    index_.prompts.push_back({offset + sizeof(ListHeader), length});
    return static_cast<std::int64_t>(index_.prompts.size()) - 1;
  });
}

std::int64_t Store::append_settings(const void* bytes, std::size_t size) {
  Entry entry = filled(kSettings, ListHeader{size}, bytes, size);
  return write(entry, [&](std::uint64_t offset) {
    index_.settings.push_back({offset + sizeof(ListHeader), size});
    return static_cast<std::int64_t>(index_.settings.size()) - 1;
  });
}

std::int64_t Store::append(NewRollout rollout, Limit limit, const Poll& poll) {
  journal_.check_owned();
  check_tokens(rollout.token_ids(), rollout.length_);
  rollout.entry_.seal();
  {
    std::unique_lock lock(mutex_);
    index_.check(rollout.info_);
    const auto has_room = [&] {
      return closed_ || capacity_ == 0 || waiting_.size() + reserved_ < capacity_;
    };
    if (!wait(lock, left_, limit, poll, has_room)) {
      throw TimedOut("append: " + std::to_string(capacity_) + " rollouts wait to be taken");
    }
    check_open();
    ++reserved_;
  }
  try {
    return write(rollout.entry_, [&](std::uint64_t offset) {
      const auto index = static_cast<std::int64_t>(index_.rollouts.size());
      index_.rollouts.push_back({rollout.info_, {offset + sizeof(RolloutHeader), rollout.length_}});
      waiting_.push_back(index);
      --reserved_;
      arrived_.notify_all();
      return index;
    });
  } catch (...) {
    std::lock_guard lock(mutex_);
    --reserved_;
    left_.notify_one();
    throw;
  }
}

void Store::annotate(std::int64_t rollout, const void* bytes, std::size_t size) {
  journal_.check_owned();
  {
    std::lock_guard lock(mutex_);
    index_.check_rollout(rollout);
  }
  Entry entry = filled(kNote, NoteHeader{rollout, size}, bytes, size);
  write(entry, [&](std::uint64_t offset) {
    index_.notes[rollout].push_back({offset + sizeof(NoteHeader), size});
    return rollout;
  });
}

std::vector<Rollout> Store::take(std::size_t count, Limit limit, const Poll& poll) {
  journal_.check_owned();
  if (capacity_ != 0 && count > capacity_) {
    throw InvalidInput("n is " + std::to_string(count) + ": no more than " +
                       std::to_string(capacity_) + " rollouts ever wait (capacity)");
  }
  std::unique_lock lock(mutex_);
  wait(lock, arrived_, limit, poll, [&] { return closed_ || waiting_.size() >= count; });
  count = std::min(count, waiting_.size());
  std::vector<Rollout> taken;
  taken.reserve(count);
  for (std::size_t i = 0; i < count; ++i) taken.push_back(view(waiting_[i]));
  // Nothing is taken that could not be handed out.
  waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(count));
  left_.notify_all();
  return taken;
}

// Waits until ready(); false where the time was up first.
template <typename Ready>
bool Store::wait(std::unique_lock<std::mutex>& lock, std::condition_variable& changed, Limit limit,
                 const Poll& poll, Ready ready) {
  using Seconds = std::chrono::duration<double>;
  const auto start = std::chrono::steady_clock::now();
  while (!ready()) {
    Seconds slice = kSlice;
    if (limit) {
      slice = std::min<Seconds>(slice, *limit - (std::chrono::steady_clock::now() - start));
    }
    if (slice.count() <= 0) return false;
    if (changed.wait_for(lock, slice, ready)) return true;
    lock.unlock();
    poll();
    lock.lock();
  }
  return true;
}

template <typename T, typename Header>
Span<T> Store::span(const Index::Place& place) {
  constexpr std::uint64_t before = kEntryHeader + sizeof(Header);
  const auto mapping = windows_.find(place.offset - before, before + place.length * sizeof(T));
  return {mapping, reinterpret_cast<const T*>(mapping->at(place.offset)), place.length};
}

Rollout Store::view(std::int64_t index) {
  const Index::RolloutPlace& place = element(index_.rollouts, index, "rollout");
  // Both arrays at once: they are one piece of the file.
  const std::uint64_t length = place.tokens.length;
  const auto both = span<std::int32_t, RolloutHeader>({place.tokens.offset, 2 * length});
  return {index,
          place.info,
          {both.mapping, both.data, length},
          {both.mapping, reinterpret_cast<const float*>(both.data + length), length}};
}

Rollout Store::rollout(std::int64_t index) {
  std::lock_guard lock(mutex_);
  return view(index);
}

Span<std::int32_t> Store::prompt(std::int64_t index) {
  std::lock_guard lock(mutex_);
  return span<std::int32_t, ListHeader>(element(index_.prompts, index, "prompt"));
}

Span<std::uint8_t> Store::settings(std::int64_t index) {
  std::lock_guard lock(mutex_);
  return span<std::uint8_t, ListHeader>(element(index_.settings, index, "settings"));
}

std::vector<Span<std::uint8_t>> Store::notes(std::int64_t rollout) {
  std::lock_guard lock(mutex_);
  element(index_.rollouts, rollout, "rollout");
  std::vector<Span<std::uint8_t>> notes;
  const auto found = index_.notes.find(rollout);
  if (found == index_.notes.end()) return notes;
  for (const Index::Place& place : found->second) {
    notes.push_back(span<std::uint8_t, NoteHeader>(place));
  }
  return notes;
}

std::size_t Store::size() {
  std::lock_guard lock(mutex_);
  return index_.rollouts.size();
}

void Store::commit() {
  journal_.commit();
}

void Store::close() {
  if (!journal_.owned()) return;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
  }
  arrived_.notify_all();
  left_.notify_all();
  // After what is being appended now.
  std::lock_guard appending(appending_);
  journal_.close();
}

}  // namespace fastalign
