#include "store.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "invalid_input.h"
#include "temporary.h"

namespace {

using namespace std::chrono_literals;
using fastalign::CorruptJournal;
using fastalign::Finish;
using fastalign::InvalidInput;
using fastalign::NewRollout;
using fastalign::Rollout;
using fastalign::RolloutInfo;
using fastalign::Span;
using fastalign::Store;
using fastalign::TimedOut;
using fastalign::tests::Bytes;
using fastalign::tests::TemporaryFile;

constexpr std::uint64_t kMiB = 1 << 20;
const Store::Limit kForEver;

void ignore() {}

NewRollout rollout(std::uint64_t seed, std::size_t length, std::int64_t prompt = 0) {
  NewRollout made({prompt, 0, seed, 3, Finish::length}, length);
  for (std::size_t i = 0; i < length; ++i) {
    made.token_ids()[i] = static_cast<std::int32_t>(seed + i);
    made.logprobs()[i] = -static_cast<float>(i);
  }
  return made;
}

bool is(const Rollout& found, std::uint64_t seed, std::size_t length) {
  bool same = found.info.seed == seed && found.info.weight_version == 3 &&
              found.info.finish == Finish::length && found.token_ids.size == length &&
              found.logprobs.size == length;
  for (std::size_t i = 0; same && i < length; ++i) {
    same = found.token_ids.data[i] == static_cast<std::int32_t>(seed + i) &&
           found.logprobs.data[i] == -static_cast<float>(i);
  }
  return same;
}

// With a prompt and settings, which rollouts refer to.
void prepare(Store& store) {
  const std::int32_t ids[] = {1, 2, 3};
  CHECK(store.append_prompt(ids, 3) == 0);
  CHECK(store.append_settings("warm", 4) == 0);
}

template <typename T>
std::vector<T> values(const Span<T>& span) {
  return {span.data, span.data + span.size};
}

TEST(comes_back_from_its_journal) {
  const TemporaryFile file;
  {
    Store store(file.path(), kMiB, 0);
    prepare(store);
    CHECK(store.append(rollout(10, 5), kForEver, ignore) == 0);
    CHECK(store.append(rollout(20, 0), kForEver, ignore) == 1);
    store.annotate(0, "good", 4);
    store.annotate(0, "", 0);
    CHECK(store.take(2, kForEver, ignore).size() == 2);
  }
  Store store(file.path(), kMiB, 0);
  CHECK(store.size() == 2);
  CHECK(is(store.rollout(0), 10, 5));
  CHECK(is(store.rollout(1), 20, 0));
  CHECK((values(store.prompt(0)) == std::vector<std::int32_t>{1, 2, 3}));
  CHECK((values(store.settings(0)) == Bytes{'w', 'a', 'r', 'm'}));
  const auto notes = store.notes(0);
  CHECK(notes.size() == 2 && notes[1].size == 0);
  CHECK((values(notes[0]) == Bytes{'g', 'o', 'o', 'd'}));
  CHECK(store.notes(1).empty());
  // Who took them may not have come to the end of it.
  CHECK(store.take(2, kForEver, ignore).size() == 2);
}

TEST(refuses_what_it_does_not_know) {
  Store store("", kMiB, 2);
  prepare(store);
  CHECK(MESSAGE_OF(InvalidInput, store.append(rollout(0, 1, 1), kForEver, ignore)) ==
        "prompt 1 is not in the store, which has 1");
  CHECK(MESSAGE_OF(InvalidInput, store.annotate(0, "", 0)) ==
        "rollout 0 is not in the store, which has 0");
  CHECK(MESSAGE_OF(std::out_of_range, store.rollout(-1)) ==
        "rollout -1 is not in the store, which has 0");
  CHECK(MESSAGE_OF(InvalidInput, store.append(rollout(-3, 1), kForEver, ignore)) ==
        "token_ids[0] is -3; token ids are not negative");
  CHECK(MESSAGE_OF(InvalidInput, store.take(3, kForEver, ignore)) ==
        "n is 3: no more than 2 rollouts ever wait (capacity)");
}

TEST(refuses_a_journal_of_something_else) {
  const TemporaryFile file;
  {
    fastalign::Journal journal(file.path(), [](const fastalign::EntryView&) {});
    fastalign::Entry entry(77, 0);
    entry.seal();
    journal.append(entry);
  }
  CHECK(MESSAGE_OF(CorruptJournal, Store(file.path(), kMiB, 0)) ==
        file.path() + " is no store of rollouts: entry at byte 32 is of the unknown kind 77");
}

TEST(waits_with_a_time_limit) {
  Store store("", kMiB, 1);
  prepare(store);
  CHECK(store.take(1, 0.0s, ignore).empty());
  CHECK(store.take(1, 0.02s, ignore).empty());
  store.append(rollout(0, 1), 0.0s, ignore);
  CHECK(MESSAGE_OF(TimedOut, store.append(rollout(1, 1), 0.02s, ignore)) ==
        "append: 1 rollouts wait to be taken");
  CHECK(store.take(1, 0.0s, ignore).size() == 1);
  CHECK(store.append(rollout(1, 1), 0.0s, ignore) == 1);
}

TEST(a_poll_ends_a_wait) {
  Store store("", kMiB, 0);
  int polls = 0;
  const auto stop_at_the_third = [&] {
    if (++polls == 3) throw InvalidInput("interrupted");
  };
  CHECK(MESSAGE_OF(InvalidInput, store.take(1, kForEver, stop_at_the_third)) == "interrupted");
}

TEST(closing_ends_all_waits) {
  Store store("", kMiB, 1);
  prepare(store);
  store.append(rollout(0, 1), kForEver, ignore);
  std::atomic<int> refused{0};
  std::thread producer([&] {
    try {
      store.append(rollout(1, 1), kForEver, ignore);
    } catch (const InvalidInput&) {
      ++refused;
    }
  });
  std::this_thread::sleep_for(20ms);
  store.close();
  producer.join();
  CHECK(refused == 1);
  // What is there can still be had, and then no more.
  CHECK(store.take(1, kForEver, ignore).size() == 1);
  CHECK(store.take(1, kForEver, ignore).empty());
  CHECK(is(store.rollout(0), 0, 1));
  CHECK(MESSAGE_OF(InvalidInput, store.append_settings("", 0)) == "the store is closed");
}

TEST(hands_every_rollout_to_one_of_many_consumers) {
  constexpr std::int64_t kProducers = 3, kConsumers = 3, kEach = 400;
  const TemporaryFile file;
  Store store(file.path(), 2 * fastalign::Windows::kWindow, 16);
  prepare(store);
  std::vector<std::thread> producers, consumers;
  std::mutex mutex;
  std::multiset<std::uint64_t> taken;
  std::atomic<bool> good{true};
  std::atomic<std::int64_t> annotated{0};
  for (std::int64_t c = 0; c < kConsumers; ++c) {
    consumers.emplace_back([&] {
      for (;;) {
        const auto got = store.take(5, kForEver, ignore);
        if (got.empty()) return;
        for (const Rollout& r : got) {
          if (!is(r, r.info.seed, r.info.seed % 600)) good = false;
          store.annotate(r.index, &r.info.seed, sizeof r.info.seed);
          const std::lock_guard lock(mutex);
          taken.insert(r.info.seed);
          ++annotated;
        }
      }
    });
  }
  for (std::int64_t p = 0; p < kProducers; ++p) {
    producers.emplace_back([&, p] {
      for (std::int64_t i = 0; i < kEach; ++i) {
        const std::int64_t seed = p * kEach + i;
        store.append(rollout(seed, static_cast<std::size_t>(seed % 600)), kForEver, ignore);
        if (i % 100 == 0) store.commit();
      }
    });
  }
  for (std::thread& thread : producers) thread.join();
  while (annotated < kProducers * kEach) std::this_thread::sleep_for(1ms);
  store.close();
  for (std::thread& thread : consumers) thread.join();
  CHECK(good);
  CHECK(taken.size() == kProducers * kEach);
  CHECK(std::set<std::uint64_t>(taken.begin(), taken.end()).size() == taken.size());

  Store again(file.path(), kMiB, 0);
  CHECK(again.size() == taken.size());
  for (std::int64_t i = 0; i < kProducers * kEach; ++i) {
    const Rollout found = again.rollout(i);
    CHECK(is(found, found.info.seed, found.info.seed % 600));
    const auto notes = again.notes(i);
    CHECK(notes.size() == 1);
    std::uint64_t note = 0;
    std::memcpy(&note, notes[0].data, sizeof note);
    CHECK(note == found.info.seed);
  }
}

// Of the rollout with this number; some are so long that a kill can tear them.
std::size_t length_of(std::uint64_t index) {
  return index % 20 == 10 ? 30'000 + index * 7919 % 30'000 : index * 7919 % 300;
}

// Appends for ever, each rollout with a note, and says after a commit how many there are.
[[noreturn]] void write_for_ever(const std::string& path, int acknowledge) {
  Store store(path, kMiB, 0);
  if (store.size() == 0) prepare(store);
  for (std::uint64_t i = store.size();; ++i) {
    const std::int64_t index = store.append(rollout(i, length_of(i)), kForEver, ignore);
    store.annotate(index, &i, sizeof i);
    if (i % 6 != 5) continue;
    store.commit();
    const std::uint64_t count = i + 1;
    if (::write(acknowledge, &count, sizeof count) != sizeof count) ::_exit(1);
  }
}

std::uint64_t size_of(const std::string& path) {
  struct stat info{};
  return ::stat(path.c_str(), &info) == 0 ? static_cast<std::uint64_t>(info.st_size) : 0;
}

// How many rollouts a writer acknowledged before SIGKILL came, once its file had `size` bytes.
std::uint64_t acknowledged_when_killed(const std::string& path, std::uint64_t size) {
  int ends[2];
  CHECK(::pipe(ends) == 0);
  const pid_t child = ::fork();
  CHECK(child >= 0);
  if (child == 0) {
    try {
      write_for_ever(path, ends[1]);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      ::_exit(1);
    }
  }
  ::close(ends[1]);
  int status = 0;
  bool ended = false;
  while (!ended && size_of(path) < size) ended = ::waitpid(child, &status, WNOHANG) == child;
  if (!ended) {
    ::kill(child, SIGKILL);
    ::waitpid(child, &status, 0);
  }
  std::uint64_t count = 0, said = 0;
  while (::read(ends[0], &said, sizeof said) == sizeof said) count = said;
  ::close(ends[0]);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  return count;
}

TEST(loses_nothing_that_a_writer_acknowledged_before_it_was_killed) {
  constexpr int kJournals = 10, kKills = 20;
  std::mt19937_64 random(0);
  std::uint64_t acknowledged_at_all = 0;
  for (int journal = 0; journal < kJournals; ++journal) {
    const TemporaryFile file;
    std::uint64_t acknowledged = 0, checked = 0;
    for (int kill = 0; kill < kKills; ++kill) {
      const std::uint64_t size = size_of(file.path()) + random() % (kMiB / 2);
      acknowledged = std::max(acknowledged, acknowledged_when_killed(file.path(), size));
      Store store(file.path(), kMiB, 0);
      CHECK(store.size() >= acknowledged);
      for (; checked < store.size(); ++checked) {
        const auto index = static_cast<std::int64_t>(checked);
        CHECK(is(store.rollout(index), checked, length_of(checked)));
        // The last one may have been killed before its note; the next writer begins behind it.
        const auto notes = store.notes(index);
        if (notes.empty() && checked + 1 == store.size()) {
          store.annotate(index, &checked, sizeof checked);
        } else {
          CHECK(notes.size() == 1 && std::memcmp(notes[0].data, &checked, sizeof checked) == 0);
        }
      }
    }
    acknowledged_at_all += acknowledged;
  }
  CHECK(acknowledged_at_all > kJournals * kKills);
}

TEST(views_outlive_their_window_and_their_store) {
  // 40 MiB through a limit of two windows.
  constexpr std::int64_t kCount = 160;
  constexpr std::size_t kLength = kMiB / 32;
  std::vector<Rollout> held;
  {
    Store store("", 2 * 2 * fastalign::Windows::kWindow, 0);
    prepare(store);
    for (std::int64_t i = 0; i < kCount; ++i) store.append(rollout(i, kLength), kForEver, ignore);
    for (std::int64_t i = 0; i < kCount; ++i) {
      const Rollout found = store.rollout(i);
      CHECK(is(found, i, kLength));
      if (i % 50 == 0) held.push_back(found);
    }
    CHECK(is(store.rollout(0), 0, kLength));
  }
  for (std::size_t i = 0; i < held.size(); ++i) {
    CHECK(is(held[i], static_cast<std::int64_t>(50 * i), kLength));
  }
}

TEST(what_is_written_to_a_view_stays_there) {
  const TemporaryFile file;
  Store store(file.path(), 1 << 28, 0);
  prepare(store);
  store.append(rollout(1, 10), kForEver, ignore);
  const Bytes before = file.read();
  const Rollout held = store.rollout(0);
  for (std::size_t i = 0; i < 10; ++i) const_cast<std::int32_t*>(held.token_ids.data)[i] = 77;
  CHECK(file.read() == before);
  // On the same page, of which there is a copy now.
  store.append(rollout(2, 10), kForEver, ignore);
  store.annotate(1, "good", 4);
  CHECK(is(store.rollout(1), 2, 10));
  CHECK((values(store.notes(1)[0]) == Bytes{'g', 'o', 'o', 'd'}));
  CHECK(held.token_ids.data[9] == 77);
}

TEST(holds_a_rollout_larger_than_a_window) {
  Store store("", 0, 0);
  prepare(store);
  const std::size_t large = fastalign::Windows::kWindow / 4;
  store.append(rollout(1, 10), kForEver, ignore);
  store.append(rollout(2, large), kForEver, ignore);
  store.append(rollout(3, 10), kForEver, ignore);
  CHECK(is(store.rollout(0), 1, 10));
  CHECK(is(store.rollout(1), 2, large));
  CHECK(is(store.rollout(2), 3, 10));
}

}  // namespace
