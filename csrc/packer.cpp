#include "packer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "invalid_input.h"

namespace fastalign {
namespace {

// Attention kernels take int32 offsets, so no pack may hold more tokens or keys than that.
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

// Arrays begin at multiples of this: kernels read aligned memory faster, and Triton compiles anew
// for a pointer that is not a multiple of 16.
constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Everything that can be wrong without reading more than a byte.
void check(const SequenceView& sequence, std::size_t s) {
  if (sequence.length != sequence.mask_length) {
    throw InvalidInput(item("loss_mask", s) + " has " + std::to_string(sequence.mask_length) +
                       " entries but " + item("input_ids", s) + " has " +
                       std::to_string(sequence.length) + " tokens");
  }
  if (sequence.length == 0) {
    throw InvalidInput(item("input_ids", s) + " is empty; every sequence needs a token");
  }
  if (sequence.loss_mask[0] != 0) {
    throw InvalidInput(item("loss_mask", s) + "[0] is true, but no token predicts the first one " +
                       "(input_ids " + std::to_string(sequence.input_ids[0]) + ")");
  }
}

std::size_t count_trained(const SequenceView& sequence) {
  std::size_t count = 0;
  for (std::size_t t = 0; t < sequence.length; ++t) count += sequence.loss_mask[t] != 0;
  return count;
}

// The pairs of a segment whose last `queries` of `keys` tokens are its own: each sees itself and
// all before it. In double, for the square of 2^31 tokens may be added up often.
double pairs_of(std::size_t queries, std::size_t keys) {
  const auto q = static_cast<double>(queries);
  return q * static_cast<double>(keys) - q * (q - 1) / 2;
}

// The first t in [begin, end) whose mask byte is set, or is not set; end where there is none.
// Masks are a few long runs, so eight bytes are looked at in one.
template <bool kSet>
std::size_t find(const std::uint8_t* mask, std::size_t begin, std::size_t end) {
  constexpr std::uint64_t kOnes = 0x0101010101010101u;
  std::size_t t = begin;
  for (; t + 8 <= end; t += 8) {
    std::uint64_t word;
    std::memcpy(&word, mask + t, sizeof word);
    // Whether any byte is set, and whether any is zero, in the textbook form.
    const bool found = kSet ? word != 0 : ((word - kOnes) & ~word & (kOnes << 7)) != 0;
    if (found) break;
  }
  while (t < end && (mask[t] != 0) != kSet) ++t;
  return t;
}

// Copies token ids; whether one of them was negative. What is looked at is what is written, though
// the source may change meanwhile.
bool widen(const std::int32_t* __restrict from, std::size_t count, std::int64_t* __restrict to) {
  std::int32_t signs = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t id = from[i];
    signs |= id;
    to[i] = id;
  }
  return signs < 0;
}

// The arrays of a pack, in the memory of a layout.
struct Arrays {
  std::int64_t* input_ids;     // [T]
  std::int64_t* positions;     // [T]
  std::int64_t* rows;          // [M]
  std::int64_t* targets;       // [M]
  std::int64_t* streams;       // [M]
  std::int64_t* key_index;     // [K]
  std::int64_t* records;       // [S]
  std::int32_t* cu_seqlens_q;  // [G+1]
  std::int32_t* cu_seqlens_k;  // [G+1]
  std::int32_t* cu_rows;       // [S+1]
  std::int32_t* segments;      // [S]
  float* weights;              // [R]
};

// Name, pointer and length of every array: the one place that says what a pack is made of. Keys are
// as queries where nothing is shared, and then have no arrays of their own.
template <typename Visit>
void each_array(const Sizes& sizes, Arrays& arrays, Visit visit) {
  const bool shared = sizes.keys != sizes.tokens;
  visit("input_ids", "int64", arrays.input_ids, sizes.tokens);
  visit("positions", "int64", arrays.positions, sizes.tokens);
  visit("rows", "int64", arrays.rows, sizes.rows);
  visit("targets", "int64", arrays.targets, sizes.rows);
  visit("streams", "int64", arrays.streams, sizes.rows);
  if (shared) visit("key_index", "int64", arrays.key_index, sizes.keys);
  visit("records", "int64", arrays.records, sizes.streams);
  visit("cu_seqlens_q", "int32", arrays.cu_seqlens_q, sizes.segments + 1);
  if (shared) visit("cu_seqlens_k", "int32", arrays.cu_seqlens_k, sizes.segments + 1);
  visit("cu_rows", "int32", arrays.cu_rows, sizes.streams + 1);
  visit("segments", "int32", arrays.segments, sizes.streams);
  visit("weights", "float32", arrays.weights, sizes.records);
}

// Writes a pack front to back.
class Writer {
 public:
  Writer(const Arrays& out, bool shared) : out_(out), shared_(shared) {
    out_.cu_seqlens_q[0] = 0;
    if (shared_) out_.cu_seqlens_k[0] = 0;
    out_.cu_rows[0] = 0;
  }

  void begin_record(float weight) { out_.weights[record_++] = weight; }

  // Tokens [begin, end) of sequence s as a segment. Its keys are they and, before them, the tokens
  // of the segment before the streams of this record, [prefix, prefix + begin) in the pack.
  void segment(const SequenceView& sequence, std::size_t s, std::size_t begin, std::size_t end,
               std::size_t prefix) {
    const std::size_t length = end - begin;
    if (widen(sequence.input_ids + begin, length, out_.input_ids + token_)) {
      throw_negative(s, begin, length);
    }
    const auto first = static_cast<std::int64_t>(begin);
    std::iota(out_.positions + token_, out_.positions + token_ + length, first);
    if (shared_) {
      std::iota(out_.key_index + key_, out_.key_index + key_ + begin,
                static_cast<std::int64_t>(prefix));
      std::iota(out_.key_index + key_ + begin, out_.key_index + key_ + end,
                static_cast<std::int64_t>(token_));
      key_ += end;
      out_.cu_seqlens_k[segment_ + 1] = static_cast<std::int32_t>(key_);
    }
    token_ += length;
    out_.cu_seqlens_q[++segment_] = static_cast<std::int32_t>(token_);
  }

  // The stream whose segment, tokens [begin, ...) of sequence s, was written last.
  void stream(const SequenceView& sequence, std::size_t s, std::size_t begin, std::size_t prefix,
              std::size_t rows) {
    const std::size_t length = sequence.length;
    // Where token 0 would lie if the segment held the shared ones too.
    const std::size_t origin = token_ - length;
    std::size_t left = rows;
    std::size_t t = find<true>(sequence.loss_mask, std::max<std::size_t>(begin, 1), length);
    while (t < length) {
      const std::size_t end = find<false>(sequence.loss_mask, t, length);
      const std::size_t run = end - t;
      if (run > left) throw_changed(s);
      std::iota(out_.rows + row_, out_.rows + row_ + run,
                static_cast<std::int64_t>(origin + t - 1));
      // The first token behind the shared ones is predicted by the last of these.
      if (t == begin) out_.rows[row_] = static_cast<std::int64_t>(prefix + begin - 1);
      // From what was written: that is known to hold no negative id.
      std::memcpy(out_.targets + row_, out_.input_ids + origin + t, run * sizeof(std::int64_t));
      std::fill_n(out_.streams + row_, run, static_cast<std::int64_t>(stream_));
      row_ += run;
      left -= run;
      t = find<true>(sequence.loss_mask, end, length);
    }
    if (left != 0) throw_changed(s);
    out_.records[stream_] = static_cast<std::int64_t>(record_ - 1);
    out_.segments[stream_] = static_cast<std::int32_t>(segment_ - 1);
    out_.cu_rows[++stream_] = static_cast<std::int32_t>(row_);
  }

  std::size_t tokens() const { return token_; }

 private:
  [[noreturn]] void throw_negative(std::size_t s, std::size_t begin, std::size_t length) const {
    const std::int64_t* ids = out_.input_ids + token_;
    const std::int64_t* bad = std::find_if(ids, ids + length, [](auto id) { return id < 0; });
    throw InvalidInput(item("input_ids", s) + "[" +
                       std::to_string(bad - ids + std::int64_t(begin)) + "] is " +
                       std::to_string(*bad) + "; token ids are not negative");
  }

  [[noreturn]] static void throw_changed(std::size_t s) {
    throw InvalidInput(item("loss_mask", s) + " was changed while it was packed");
  }

  Arrays out_;
  const bool shared_;
  std::size_t token_ = 0, key_ = 0, row_ = 0, segment_ = 0, stream_ = 0, record_ = 0;
};

struct Bin {
  std::int64_t tokens = 0;
  double cost = 0;
  std::vector<std::int64_t> examples;

  void add(std::size_t example, std::int64_t length, double price) {
    tokens += length;
    cost += price;
    examples.push_back(static_cast<std::int64_t>(example));
  }

  // Adds up anew what it holds.
  void measure(const std::vector<std::int64_t>& lengths, const std::vector<double>& costs) {
    tokens = 0;
    cost = 0;
    for (const std::int64_t example : examples) {
      tokens += lengths[static_cast<std::size_t>(example)];
      cost += costs[static_cast<std::size_t>(example)];
    }
  }
};

template <typename T>
std::vector<std::size_t> largest_first(const std::vector<T>& values) {
  std::vector<std::size_t> order(values.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&values](std::size_t a, std::size_t b) { return values[a] > values[b]; });
  return order;
}

// A tournament tree over the room left in each bin: the first bin with room is found in O(log n).
class RoomTree {
 public:
  RoomTree(std::size_t bins, std::int64_t room) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, room);
  }

  // The leftmost bin with `needed` room; the caller knows that there is one.
  std::size_t first_with(std::int64_t needed) const {
    std::size_t node = 1;
    while (node < leaves_) node = room_[2 * node] >= needed ? 2 * node : 2 * node + 1;
    return node - leaves_;
  }

  void take(std::size_t bin, std::int64_t tokens) {
    std::size_t node = bin + leaves_;
    room_[node] -= tokens;
    for (node /= 2; node >= 1; node /= 2) {
      room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    }
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<std::int64_t> room_;
};

// First-fit decreasing: close to the fewest bins (11/9 of them at worst, plus 6/9).
std::vector<Bin> first_fit(const std::vector<std::int64_t>& lengths,
                           const std::vector<double>& costs, std::int64_t budget) {
  std::vector<Bin> bins;
  RoomTree room(lengths.size(), budget);
  for (std::size_t example : largest_first(lengths)) {
    const std::int64_t length = lengths[example];
    // An example over the budget comes before all that fit, so the next bin is an untouched one.
    const std::size_t bin = length > budget ? bins.size() : room.first_with(length);
    if (bin == bins.size()) bins.emplace_back();
    bins[bin].add(example, length, costs[example]);
    room.take(bin, length);
  }
  return bins;
}

// Longest processing time first over exactly `bins` bins: each example to the one with the least of
// `loads`, so that no two bins differ by more than one example's. Returns nothing where that breaks
// the budget, which first-fit's tighter bins may not.
template <typename T>
std::vector<Bin> spread(const std::vector<T>& loads, const std::vector<std::int64_t>& lengths,
                        const std::vector<double>& costs, std::int64_t budget, std::size_t bins) {
  using Load = std::pair<T, std::size_t>;  // of the bin: ties go to the lower one
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> least;
  for (std::size_t bin = 0; bin < bins; ++bin) least.emplace(T{0}, bin);
  std::vector<Bin> filled(bins);
  for (std::size_t example : largest_first(loads)) {
    const std::int64_t length = lengths[example];
    const auto [load, bin] = least.top();
    if (!filled[bin].examples.empty() && filled[bin].tokens + length > budget) return {};
    least.pop();
    filled[bin].add(example, length, costs[example]);
    least.emplace(load + loads[example], bin);
  }
  return filled;
}

// One example for another, or for none, between two bins.
class Exchange {
 public:
  // The one after which their costs differ least, of those that the budget allows. Between `from`,
  // the costlier one, and `to`.
  Exchange(const Bin& from, const Bin& to, const std::vector<std::int64_t>& lengths,
           const std::vector<double>& costs, std::int64_t budget)
      : difference_(from.cost - to.cost), left_(difference_) {
    // Those that may come back by what they cost, and nothing, which is cheapest.
    std::vector<Item> back{{0, 0, kNothing}};
    for (std::size_t i = 0; i < to.examples.size(); ++i) {
      const auto e = static_cast<std::size_t>(to.examples[i]);
      back.push_back({costs[e], lengths[e], i});
    }
    std::stable_sort(back.begin(), back.end(),
                     [](const Item& a, const Item& b) { return a.cost < b.cost; });
    for (std::size_t i = 0; i < from.examples.size(); ++i) {
      const auto e = static_cast<std::size_t>(from.examples[i]);
      const auto look = [&](const Item& item) {
        const double left = std::abs(difference_ - 2 * (costs[e] - item.cost));
        if (!(left < left_)) return false;
        const std::int64_t moved = lengths[e] - item.length;
        if (to.tokens + moved > budget || from.tokens - moved > budget) return true;
        left_ = left;
        given_ = i;
        taken_ = item.place;
        return false;
      };
      // From the best one outwards, until what is found is no better than what was.
      const auto middle =
          std::lower_bound(back.begin(), back.end(), costs[e] - difference_ / 2,
                           [](const Item& item, double cost) { return item.cost < cost; });
      for (auto item = middle; item != back.end() && look(*item);) ++item;
      for (auto item = middle; item != back.begin() && look(*--item);) continue;
    }
  }

  // Whether there is one.
  explicit operator bool() const { return left_ < difference_; }

  void apply(Bin& from, Bin& to) const {
    auto& given = from.examples[given_];
    if (taken_ == kNothing) {
      to.examples.push_back(given);
      from.examples.erase(from.examples.begin() + static_cast<std::ptrdiff_t>(given_));
    } else {
      std::swap(given, to.examples[taken_]);
    }
  }

 private:
  static constexpr std::size_t kNothing = std::numeric_limits<std::size_t>::max();
  struct Item {
    double cost;
    std::int64_t length;
    std::size_t place;
  };

  double difference_, left_;  // before and after
  std::size_t given_ = 0, taken_ = kNothing;
};

// Bins whose costs differ by less than this share are as good as even: a cost is an estimate.
constexpr double kEven = 1e-3;

// Moves or swaps single examples between the costliest and the cheapest of the bins in [begin, end)
// for as long as that brings these two closer, and no more often than there are examples.
void even_out(std::vector<Bin>::iterator begin, std::vector<Bin>::iterator end,
              const std::vector<std::int64_t>& lengths, const std::vector<double>& costs,
              std::int64_t budget) {
  std::size_t exchanges = 0;
  for (auto bin = begin; bin != end; ++bin) exchanges += bin->examples.size();
  for (; exchanges > 0; --exchanges) {
    const auto [to, from] =
        std::minmax_element(begin, end, [](const Bin& a, const Bin& b) { return a.cost < b.cost; });
    if (from->cost - to->cost <= kEven * from->cost) return;
    const Exchange best(*from, *to, lengths, costs, budget);
    if (!best) return;
    best.apply(*from, *to);
    from->measure(lengths, costs);
    to->measure(lengths, costs);
  }
}

// Deals the bins out in rounds, from the costliest down, evening out each round before: of the next
// `ranks` bins the costliest goes to the rank with the least to do, and so on. A round changes the
// difference of two ranks by at most what its bins differ by, and towards 0 or past it, so in the
// end no two ranks differ by more than the costliest and the cheapest bin of some round. The ranks
// step in lockstep, so it also matters that bins of one round are alike.
Plan deal(std::vector<Bin> bins, const std::vector<std::int64_t>& lengths,
          const std::vector<double>& costs, std::int64_t budget, std::size_t ranks) {
  const auto costlier = [](const Bin& a, const Bin& b) { return a.cost > b.cost; };
  bins.resize((bins.size() + ranks - 1) / ranks * ranks);
  std::stable_sort(bins.begin(), bins.end(), costlier);

  Plan plan(ranks);
  std::vector<double> loads(ranks, 0.0);
  std::vector<std::size_t> order(ranks);
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (auto round = bins.begin(); round != bins.end();) {
    const auto next = round + static_cast<std::ptrdiff_t>(ranks);
    even_out(round, next, lengths, costs, budget);
    std::stable_sort(round, next, costlier);
    std::sort(order.begin(), order.end(), [&loads](std::size_t a, std::size_t b) {
      return std::make_pair(loads[a], a) < std::make_pair(loads[b], b);
    });
    for (const std::size_t rank : order) {
      std::sort(round->examples.begin(), round->examples.end());
      loads[rank] += round->cost;
      plan[rank].push_back(std::move(round->examples));
      ++round;
    }
  }
  return plan;
}

// What a plan costs ranks that wait for one another after each pack.
double in_lockstep(const Plan& plan, const std::vector<double>& costs) {
  double total = 0;
  for (std::size_t step = 0; step < plan.front().size(); ++step) {
    double most = 0;
    for (const auto& rank : plan) {
      double cost = 0;
      for (const std::int64_t example : rank[step])
        cost += costs[static_cast<std::size_t>(example)];
      most = std::max(most, cost);
    }
    total += most;
  }
  return total;
}

// A plan of units as one of the examples that they are made of.
Plan expanded(const Plan& plan, const std::vector<std::vector<std::int64_t>>& units) {
  Plan made(plan.size());
  for (std::size_t rank = 0; rank < plan.size(); ++rank) {
    for (const auto& pack : plan[rank]) {
      auto& examples = made[rank].emplace_back();
      for (const std::int64_t unit : pack) {
        const auto& members = units[static_cast<std::size_t>(unit)];
        examples.insert(examples.end(), members.begin(), members.end());
      }
    }
  }
  return made;
}

}  // namespace

Layout layout(const Sizes& sizes) {
  Layout made{{}, 0};
  Arrays unused{};
  each_array(sizes, unused,
             [&made](const char* name, const char* dtype, auto*& pointer, auto count) {
               made.fields.push_back({name, dtype, made.bytes, count, sizeof *pointer});
               made.bytes = aligned(made.bytes + count * sizeof *pointer);
             });
  return made;
}

Ragged::Ragged(std::vector<SequenceView> streams, const std::vector<std::int64_t>& counts,
               std::vector<float> weights, bool share_prefixes)
    : streams_(std::move(streams)),
      prompt_(counts.size()),
      group_(counts.size()),
      tokens_(counts.size()),
      rows_(counts.size()),
      pairs_(counts.size()),
      weights_(std::move(weights)) {
  const std::size_t examples = counts.size();
  if (weights_.size() != examples) {
    throw InvalidInput("weights has " + std::to_string(weights_.size()) +
                       " entries but counts has " + std::to_string(examples));
  }
  first_.reserve(examples + 1);
  first_.push_back(0);
  for (std::size_t e = 0; e < examples; ++e) {
    const std::int64_t count = counts[e];
    const std::size_t left = streams_.size() - first_[e];
    if (count < 1 || static_cast<std::uint64_t>(count) > left) {
      throw InvalidInput(item("counts", e) + " is " + std::to_string(count) + " streams, of " +
                         std::to_string(left) + " that are left; every example needs one");
    }
    first_.push_back(first_[e] + static_cast<std::size_t>(count));
  }
  if (first_[examples] != streams_.size()) {
    throw InvalidInput("counts add up to " + std::to_string(first_[examples]) +
                       " streams but input_ids has " + std::to_string(streams_.size()));
  }

  stream_rows_.reserve(streams_.size());
  for (std::size_t s = 0; s < streams_.size(); ++s) {
    check(streams_[s], s);
    stream_rows_.push_back(count_trained(streams_[s]));
  }
  std::unordered_map<std::string_view, std::size_t> prompts;
  for (std::size_t e = 0; e < examples; ++e) {
    const std::size_t prompt = prompt_[e] = share_prefixes ? measured_prompt(e) : 0;
    group_[e] = e;
    if (prompt > 0) {
      const auto* bytes = reinterpret_cast<const char*>(streams_[first_[e]].input_ids);
      const std::string_view key(bytes, prompt * sizeof(std::int32_t));
      group_[e] = prompts.emplace(key, e).first->second;
    }
    std::size_t tokens = prompt, rows = 0;
    pairs_[e] = pairs_of(prompt, prompt);
    for (std::size_t s = first_[e]; s < first_[e + 1]; ++s) {
      tokens += streams_[s].length - prompt;
      rows += stream_rows_[s];
      pairs_[e] += pairs_of(streams_[s].length - prompt, streams_[s].length);
    }
    tokens_[e] = static_cast<std::int64_t>(tokens);
    rows_[e] = static_cast<std::int64_t>(rows);
  }
}

std::size_t Ragged::measured_prompt(std::size_t example) const {
  const SequenceView& model = streams_[first_[example]];
  std::size_t shared = model.length - 1;
  for (std::size_t s = first_[example]; s < first_[example + 1]; ++s) {
    const SequenceView& other = streams_[s];
    shared = find<true>(other.loss_mask, 0, std::min(shared, other.length - 1));
    const auto end = model.input_ids + shared;
    shared = static_cast<std::size_t>(std::mismatch(model.input_ids, end, other.input_ids).first -
                                      model.input_ids);
  }
  return shared;
}

// Calls visit(begin, end, streams, shared) for each run of examples that share a prompt, so many
// streams and tokens of it; 0 tokens where there is one stream.
template <typename Visit>
void Ragged::each_run(const std::vector<std::int64_t>& examples, Visit visit) const {
  for (std::size_t begin = 0, end = 0; begin < examples.size(); begin = end) {
    const std::size_t group = group_[checked(examples, begin)];
    std::size_t streams = 0;
    for (; end < examples.size() && group_[checked(examples, end)] == group; ++end) {
      streams += streams_of(static_cast<std::size_t>(examples[end]));
    }
    visit(begin, end, streams, streams > 1 ? prompt_[group] : 0);
  }
}

std::size_t Ragged::checked(const std::vector<std::int64_t>& examples, std::size_t position) const {
  const std::int64_t example = examples[position];
  if (example < 0 || static_cast<std::uint64_t>(example) >= tokens_.size()) {
    throw InvalidInput(item("examples", position) + " is " + std::to_string(example) + ", of " +
                       std::to_string(tokens_.size()) + " examples");
  }
  return static_cast<std::size_t>(example);
}

Sizes Ragged::sizes(const std::vector<std::int64_t>& examples) const {
  Sizes sizes;
  sizes.records = examples.size();
  each_run(examples,
           [&](std::size_t begin, std::size_t end, std::size_t streams, std::size_t shared) {
             sizes.streams += streams;
             sizes.segments += streams + (shared > 0);
             sizes.tokens += shared;
             // Every stream has the shared tokens as keys once more.
             sizes.keys += shared + streams * shared;
             for (std::size_t i = begin; i < end; ++i) {
               const auto e = static_cast<std::size_t>(examples[i]);
               const std::size_t tokens = static_cast<std::size_t>(tokens_[e]) - shared;
               sizes.tokens += tokens;
               sizes.keys += tokens;
               sizes.rows += static_cast<std::size_t>(rows_[e]);
               if (sizes.keys > static_cast<std::uint64_t>(kMaxTokens)) {
                 throw InvalidInput("the pack has " + std::to_string(sizes.keys) + " tokens by " +
                                    item("examples", i) + "; at most " +
                                    std::to_string(kMaxTokens) + " fit in int32 cu_seqlens");
               }
             }
           });
  return sizes;
}

void Ragged::fill(const std::vector<std::int64_t>& examples, unsigned char* memory,
                  std::size_t bytes) const {
  const Sizes wanted = sizes(examples);
  const Layout made = layout(wanted);
  if (made.bytes != bytes) {
    throw InvalidInput("memory has " + std::to_string(bytes) + " bytes but the pack takes " +
                       std::to_string(made.bytes));
  }
  if (reinterpret_cast<std::uintptr_t>(memory) % alignof(std::int64_t) != 0) {
    throw InvalidInput("memory must be aligned to 8 bytes");
  }
  Arrays out{};
  auto field = made.fields.begin();
  each_array(wanted, out, [&](const char*, const char*, auto*& pointer, std::size_t) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + field->offset);
    ++field;
  });

  Writer write(out, wanted.keys != wanted.tokens);
  each_run(examples, [&](std::size_t begin, std::size_t end, std::size_t, std::size_t shared) {
    const std::size_t prefix = write.tokens();
    for (std::size_t i = begin; i < end; ++i) {
      const auto e = static_cast<std::size_t>(examples[i]);
      write.begin_record(weights_[e]);
      if (shared > 0 && i == begin)
        write.segment(streams_[first_[e]], first_[e], 0, shared, prefix);
      for (std::size_t s = first_[e]; s < first_[e + 1]; ++s) {
        write.segment(streams_[s], s, shared, streams_[s].length, prefix);
        write.stream(streams_[s], s, shared, prefix, stream_rows_[s]);
      }
    }
  });
}

Ragged::Units Ragged::units(const std::vector<std::vector<std::int64_t>>& groups,
                            std::int64_t budget, std::int64_t most, const Prices& prices) const {
  Units units;
  for (const auto& group : groups) {
    for (std::size_t i = 0; i < group.size(); ++i) {
      const auto e = static_cast<std::size_t>(group[i]);
      const auto prompt = static_cast<std::int64_t>(prompt_[e]);
      std::int64_t tokens = tokens_[e];
      double pairs = pairs_[e];
      if (i > 0 && units.lengths.back() + tokens - prompt <= std::min(budget, prompt + most)) {
        tokens -= prompt;
        pairs -= pairs_of(prompt_[e], prompt_[e]);
      } else {
        units.examples.emplace_back();
        units.lengths.push_back(0);
        units.costs.push_back(0);
      }
      units.examples.back().push_back(group[i]);
      units.lengths.back() += tokens;
      units.costs.back() += prices.token * static_cast<double>(tokens) + prices.pair * pairs +
                            prices.row * static_cast<double>(rows_[e]);
    }
  }
  return units;
}

Plan Ragged::plan(std::int64_t budget, std::int64_t ranks, const Prices& prices) const {
  std::vector<std::vector<std::int64_t>> groups(tokens_.size());
  std::int64_t total = 0;
  bool shares = false;
  for (std::size_t e = 0; e < tokens_.size(); ++e) {
    auto& group = groups[group_[e]];
    if (!group.empty()) {
      total -= static_cast<std::int64_t>(prompt_[e]);
      shares = true;
    }
    total += tokens_[e];
    group.push_back(static_cast<std::int64_t>(e));
  }

  // Large units leave packs half empty, or ranks with nothing to do; every part of a group that is
  // cut costs a prompt. What is best is found by trying, from whole groups to none: the fewest
  // steps, and of these the least cost.
  const std::int64_t fair = std::min(budget, total / std::max<std::int64_t>(ranks, 1));
  Plan best;
  std::pair<std::size_t, double> least;
  for (const std::int64_t most : {fair, fair / 2, fair / 4, fair / 8, std::int64_t{0}}) {
    const Units made = units(groups, budget, most, prices);
    const Plan spread = fastalign::plan(made.lengths, made.costs, budget, ranks);
    const auto takes = std::make_pair(spread.front().size(), in_lockstep(spread, made.costs));
    if (best.empty() || takes < least) {
      least = takes;
      best = expanded(spread, made.examples);
    }
    if (!shares) break;
  }
  return best;
}

Plan plan(const std::vector<std::int64_t>& lengths, const std::vector<double>& costs,
          std::int64_t budget, std::int64_t ranks) {
  if (budget < 1 || budget > kMaxTokens) {
    throw InvalidInput("budget must be from 1 to " + std::to_string(kMaxTokens) + " tokens, got " +
                       std::to_string(budget));
  }
  if (ranks < 1) throw InvalidInput("ranks must be at least 1, got " + std::to_string(ranks));
  if (costs.size() != lengths.size()) {
    throw InvalidInput("costs has " + std::to_string(costs.size()) + " entries but lengths has " +
                       std::to_string(lengths.size()));
  }
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 1 || lengths[i] > kMaxTokens) {
      throw InvalidInput(item("lengths", i) + " must be from 1 to " + std::to_string(kMaxTokens) +
                         " tokens, got " + std::to_string(lengths[i]));
    }
    if (!std::isfinite(costs[i]) || costs[i] < 0) {
      throw InvalidInput(item("costs", i) + " must be finite and not negative, got " +
                         std::to_string(costs[i]));
    }
  }
  const auto world = static_cast<std::size_t>(ranks);
  std::vector<Bin> tight = first_fit(lengths, costs, budget);
  const std::size_t count = (tight.size() + world - 1) / world * world;
  // First-fit fills bins to the brim and leaves the last one nearly empty. The ranks take as many
  // steps as one another in any case, so even bins over all of those come free: even in cost, or
  // where that heaps up too many tokens somewhere, at least in tokens.
  std::vector<Bin> bins = spread(costs, lengths, costs, budget, count);
  if (bins.empty()) bins = spread(lengths, lengths, costs, budget, count);
  if (bins.empty()) bins = std::move(tight);
  return deal(std::move(bins), lengths, costs, budget, world);
}

}  // namespace fastalign
