#include "packer.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <string>
#include <utility>

#include "invalid_input.h"

namespace fastalign {
namespace {

// Attention kernels take int32 offsets, so no batch may hold more tokens than that.
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

// Everything that can be wrong without reading a token; returns T.
std::int64_t check_lengths(const std::vector<SequenceView>& sequences) {
  std::uint64_t total = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const SequenceView& sequence = sequences[s];
    if (sequence.length != sequence.mask_length) {
      throw InvalidInput(item("loss_mask", s) + " has " + std::to_string(sequence.mask_length) +
                         " entries but " + item("input_ids", s) + " has " +
                         std::to_string(sequence.length) + " tokens");
    }
    if (sequence.length == 0) {
      throw InvalidInput(item("input_ids", s) + " is empty; every sequence needs a token");
    }
    total += sequence.length;
    if (total > static_cast<std::uint64_t>(kMaxTokens)) {
      throw InvalidInput("the batch has " + std::to_string(total) + " tokens by " +
                         item("input_ids", s) + "; at most " + std::to_string(kMaxTokens) +
                         " fit in int32 cu_seqlens");
    }
  }
  return static_cast<std::int64_t>(total);
}

// The first pass over the masks; returns M.
std::size_t count_rows(const std::vector<SequenceView>& sequences) {
  std::size_t rows = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const SequenceView& sequence = sequences[s];
    if (sequence.loss_mask[0] != 0) {
      throw InvalidInput(item("loss_mask", s) +
                         "[0] is true, but no token predicts the first one " + "(input_ids " +
                         std::to_string(sequence.input_ids[0]) + ")");
    }
    for (std::size_t t = 1; t < sequence.length; ++t) rows += sequence.loss_mask[t] != 0;
  }
  return rows;
}

void check_tokens(const SequenceView& sequence, std::size_t s) {
  const std::int32_t* end = sequence.input_ids + sequence.length;
  // The minimum first: it vectorises, and a batch without negative ids is the rule.
  if (*std::min_element(sequence.input_ids, end) >= 0) return;
  const std::int32_t* bad =
      std::find_if(sequence.input_ids, end, [](std::int32_t id) { return id < 0; });
  throw InvalidInput(item("input_ids", s) + "[" + std::to_string(bad - sequence.input_ids) +
                     "] is " + std::to_string(*bad) + "; token ids are not negative");
}

struct Bin {
  std::int64_t tokens = 0;
  std::vector<std::int64_t> examples;

  void add(std::int64_t example, std::int64_t length) {
    tokens += length;
    examples.push_back(example);
  }
};

std::vector<std::int64_t> longest_first(const std::int64_t* lengths, std::size_t count) {
  std::vector<std::int64_t> order(count);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [lengths](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
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
std::vector<Bin> first_fit(const std::vector<std::int64_t>& order, const std::int64_t* lengths,
                           std::int64_t budget) {
  std::vector<Bin> bins;
  RoomTree room(order.size(), budget);
  for (std::int64_t example : order) {
    const std::int64_t length = lengths[example];
    // An example over the budget comes before all that fit, so the next bin is an untouched one.
    const std::size_t bin = length > budget ? bins.size() : room.first_with(length);
    if (bin == bins.size()) bins.emplace_back();
    bins[bin].add(example, length);
    room.take(bin, length);
  }
  return bins;
}

// Longest processing time first over exactly `count` bins: each example to the emptiest one.
// Returns false where that breaks the budget, which first-fit's tighter bins may not.
bool spread(const std::vector<std::int64_t>& order, const std::int64_t* lengths,
            std::int64_t budget, std::size_t count, std::vector<Bin>* bins) {
  using Load = std::pair<std::int64_t, std::size_t>;  // tokens, bin: ties go to the lower bin
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> emptiest;
  bins->assign(count, Bin{});
  for (std::size_t bin = 0; bin < count; ++bin) emptiest.emplace(0, bin);
  for (std::int64_t example : order) {
    const std::int64_t length = lengths[example];
    const auto [tokens, bin] = emptiest.top();
    if (tokens > 0 && tokens + length > budget) return false;
    emptiest.pop();
    (*bins)[bin].add(example, length);
    emptiest.emplace(tokens + length, bin);
  }
  return true;
}

// Longest processing time first over ranks, `packs` bins to each: the ranks step in lockstep, so
// the number of steps is fixed before their loads are evened out.
Plan assign(std::vector<Bin> bins, std::size_t ranks, std::size_t packs) {
  for (Bin& bin : bins) std::sort(bin.examples.begin(), bin.examples.end());
  bins.resize(ranks * packs);
  std::stable_sort(bins.begin(), bins.end(),
                   [](const Bin& a, const Bin& b) { return a.tokens > b.tokens; });

  using Load = std::pair<std::int64_t, std::size_t>;  // tokens, rank
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> idlest;
  for (std::size_t rank = 0; rank < ranks; ++rank) idlest.emplace(0, rank);
  Plan plan(ranks);
  for (Bin& bin : bins) {
    const auto [tokens, rank] = idlest.top();
    idlest.pop();
    plan[rank].push_back(std::move(bin.examples));
    if (plan[rank].size() < packs) idlest.emplace(tokens + bin.tokens, rank);
  }
  return plan;
}

}  // namespace

PackedBatch pack(const std::vector<SequenceView>& sequences) {
  const std::int64_t tokens = check_lengths(sequences);
  const std::size_t rows = count_rows(sequences);

  PackedBatch batch;
  batch.input_ids.reserve(static_cast<std::size_t>(tokens));
  batch.positions.resize(static_cast<std::size_t>(tokens));
  batch.cu_seqlens.reserve(sequences.size() + 1);
  batch.rows.reserve(rows);
  batch.targets.reserve(rows);
  batch.cu_rows.reserve(sequences.size() + 1);
  batch.cu_seqlens.push_back(0);
  batch.cu_rows.push_back(0);

  std::int64_t start = 0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const SequenceView& sequence = sequences[s];
    check_tokens(sequence, s);
    const auto length = static_cast<std::int64_t>(sequence.length);
    batch.input_ids.insert(batch.input_ids.end(), sequence.input_ids,
                           sequence.input_ids + sequence.length);
    std::iota(batch.positions.begin() + start, batch.positions.begin() + start + length,
              std::int64_t{0});
    // push_back, not an index: the masks are the caller's memory, and a mask that another thread
    // changes after the count must not write past the end.
    for (std::int64_t t = 0; t + 1 < length; ++t) {
      if (sequence.loss_mask[t + 1] == 0) continue;
      batch.rows.push_back(start + t);
      batch.targets.push_back(sequence.input_ids[t + 1]);
    }
    start += length;
    batch.cu_seqlens.push_back(static_cast<std::int32_t>(start));
    batch.cu_rows.push_back(static_cast<std::int32_t>(batch.rows.size()));
  }
  return batch;
}

Plan plan(const std::int64_t* lengths, std::size_t count, std::int64_t budget, std::int64_t ranks) {
  if (budget < 1 || budget > kMaxTokens) {
    throw InvalidInput("budget must be from 1 to " + std::to_string(kMaxTokens) + " tokens, got " +
                       std::to_string(budget));
  }
  if (ranks < 1) throw InvalidInput("ranks must be at least 1, got " + std::to_string(ranks));
  for (std::size_t i = 0; i < count; ++i) {
    if (lengths[i] < 1 || lengths[i] > kMaxTokens) {
      throw InvalidInput(item("lengths", i) + " must be from 1 to " + std::to_string(kMaxTokens) +
                         " tokens, got " + std::to_string(lengths[i]));
    }
  }
  const auto world = static_cast<std::size_t>(ranks);
  const std::vector<std::int64_t> order = longest_first(lengths, count);
  std::vector<Bin> tight = first_fit(order, lengths, budget);
  const std::size_t packs = (tight.size() + world - 1) / world;
  // First-fit fills bins to the brim and leaves the last one nearly empty. The ranks take
  // packs * world steps between them in any case, so even bins over all of those steps come free.
  std::vector<Bin> even;
  const bool fits = spread(order, lengths, budget, world * packs, &even);
  return assign(std::move(fits ? even : tight), world, packs);
}

}  // namespace fastalign
