// Rollouts in a journal: appended by samplers, taken by trainers, and read where they lie.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "journal.h"

namespace fastalign {

// A wait that met its time limit; nothing has changed.
class TimedOut : public std::runtime_error {
 public:
  explicit TimedOut(const std::string& message) : std::runtime_error(message) {}
};

enum class Finish : std::uint32_t { stop = 0, length = 1 };

// What a rollout is beside its tokens. `prompt` and `settings` are indices in the store.
struct RolloutInfo {
  std::int64_t prompt;
  std::int64_t settings;
  std::uint64_t seed;
  std::int64_t weight_version;
  Finish finish;
  std::uint32_t unused = 0;  // named, so that what is written has no bytes by chance
};

// A rollout to be appended: two arrays of `length` for the caller to fill.
class NewRollout {
 public:
  NewRollout(const RolloutInfo& info, std::size_t length);
  std::int32_t* token_ids();
  float* logprobs();

 private:
  friend class Store;
  RolloutInfo info_;
  std::uint32_t length_;
  Entry entry_;
};

// Elements that lie in a mapping, which keeps them in place.
template <typename T>
struct Span {
  std::shared_ptr<const Mapping> mapping;
  const T* data;
  std::size_t size;
};

struct Rollout {
  std::int64_t index;
  RolloutInfo info;
  Span<std::int32_t> token_ids;
  Span<float> logprobs;
};

// Mappings of one file by windows of kWindow bytes. At most `max_bytes` of them are kept; beside
// them there are those that somebody holds. What is dropped is in the file, and mapped again when
// asked for.
// Not for several threads at the same time.
class Windows {
 public:
  static constexpr std::uint64_t kWindow = std::uint64_t{1} << 22;

  Windows(const Journal& journal, std::uint64_t max_bytes);
  // A mapping that shows the entry at `offset`, of `size` bytes with its header.
  std::shared_ptr<const Mapping> find(std::uint64_t offset, std::uint64_t size);

 private:
  struct Kept {
    std::shared_ptr<const Mapping> mapping;
    std::uint64_t used;
  };
  std::shared_ptr<const Mapping> map(std::uint64_t number);
  void keep(std::uint64_t number, const std::shared_ptr<const Mapping>& mapping);

  const Journal& journal_;
  std::uint64_t max_bytes_;
  // By number of the window: all that there are, and of those what is kept.
  std::map<std::uint64_t, std::weak_ptr<const Mapping>> known_;
  std::map<std::uint64_t, Kept> kept_;
  std::uint64_t kept_bytes_ = 0;
  std::uint64_t uses_ = 0;
};

// What lies where in a journal of rollouts. Not for several threads at the same time.
class Index {
 public:
  struct Place {
    std::uint64_t offset;  // of the first element in the file
    std::uint64_t length;  // in elements
  };
  struct RolloutPlace {
    RolloutInfo info;
    Place tokens;  // the log-probs follow them
  };

  // Adds an entry that was read. Throws InvalidInput where no store wrote such a one.
  void add(const EntryView& entry);
  // Throws InvalidInput where the entry names a prompt, settings or a rollout that are not there.
  void check(const RolloutInfo& info) const;
  void check_rollout(std::int64_t rollout) const;

  std::vector<Place> prompts;
  std::vector<Place> settings;
  std::vector<RolloutPlace> rollouts;
  std::unordered_map<std::int64_t, std::vector<Place>> notes;
};

// The store. Any number of threads may call it at the same time. In a process that was forked from
// the one that opened it, what would write or take throws InvalidInput, and closing does nothing.
class Store {
 public:
  // How long a call may wait; none means for ever.
  using Limit = std::optional<std::chrono::duration<double>>;
  // Called every 50 ms of a wait without a lock; ends the wait by throwing.
  using Poll = std::function<void()>;

  // Opens the journal at `path`, or an unnamed one that ends with the store. All rollouts that it
  // holds are to be taken again. At most `max_bytes` of it stay mapped without anybody holding
  // them; at most `capacity` rollouts wait to be taken, 0 meaning any number.
  Store(const std::string& path, std::uint64_t max_bytes, std::size_t capacity);

  const Recovery& recovery() const { return journal_.recovery(); }

  // Each returns the index of what it appended, counted from 0 by kind. Once it returns, that
  // survives the process; commit() makes it survive the machine.
  std::int64_t append_prompt(const std::int32_t* token_ids, std::size_t length);
  std::int64_t append_settings(const void* bytes, std::size_t size);
  // Waits while `capacity` rollouts are there to be taken. Throws TimedOut.
  std::int64_t append(NewRollout rollout, Limit limit, const Poll& poll);
  // Adds a judgment, a score or anything else to a rollout.
  void annotate(std::int64_t rollout, const void* bytes, std::size_t size);

  // The oldest `count` rollouts that nobody took yet. Waits until there are so many; returns those
  // there are, maybe none, once the time is up or the store is closed.
  std::vector<Rollout> take(std::size_t count, Limit limit, const Poll& poll);

  // Each throws std::out_of_range where there is no such thing.
  Rollout rollout(std::int64_t index);
  Span<std::int32_t> prompt(std::int64_t index);
  Span<std::uint8_t> settings(std::int64_t index);
  std::vector<Span<std::uint8_t>> notes(std::int64_t rollout);
  std::size_t size();

  void commit();
  // Commits, refuses what would be appended from now on and ends all waits. What is there can
  // still be taken and read.
  void close();

 private:
  template <typename Ready>
  bool wait(std::unique_lock<std::mutex>& lock, std::condition_variable& changed, Limit limit,
            const Poll& poll, Ready ready);
  void check_open() const;
  std::int64_t write(Entry& entry, const std::function<std::int64_t(std::uint64_t)>& publish);
  // Of a place behind a payload's header.
  template <typename T, typename Header>
  Span<T> span(const Index::Place& place);
  Rollout view(std::int64_t index);

  Index index_;  // first, for the journal fills it
  Journal journal_;
  const std::size_t capacity_;

  std::mutex appending_;  // the order of the journal is that of the index
  std::mutex mutex_;      // of the index and everything below
  Windows windows_;
  std::condition_variable arrived_, left_;
  std::deque<std::int64_t> waiting_;
  std::size_t reserved_ = 0;  // places in the queue of those that are being appended
  bool closed_ = false;
};

}  // namespace fastalign
