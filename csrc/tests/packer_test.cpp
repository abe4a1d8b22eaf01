#include "packer.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "invalid_input.h"

namespace {

using fastalign::Field;
using fastalign::InvalidInput;
using fastalign::Layout;
using fastalign::Ragged;
using fastalign::SequenceView;

struct Stream {
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> mask;
};

std::vector<SequenceView> views(const std::vector<Stream>& streams) {
  std::vector<SequenceView> made;
  for (const Stream& s : streams) {
    made.push_back({s.ids.data(), s.ids.size(), s.mask.data(), s.mask.size()});
  }
  return made;
}

Ragged ragged(const std::vector<Stream>& streams, const std::vector<std::int64_t>& counts,
              bool share = false) {
  return {views(streams), counts, std::vector<float>(counts.size(), 1.0f), share};
}

// A pack and the memory it lies in, exactly as long as it should be: a sanitizer sees every write
// beside it.
class Packed {
 public:
  Packed(const Ragged& ragged, const std::vector<std::int64_t>& examples)
      : layout_(fastalign::layout(ragged.sizes(examples))), memory_(layout_.bytes) {
    ragged.fill(examples, memory_.data(), memory_.size());
  }

  template <typename T>
  std::vector<T> get(const std::string& name) const {
    for (const Field& field : layout_.fields) {
      if (field.name != name) continue;
      std::vector<T> values(field.count);
      std::memcpy(values.data(), memory_.data() + field.offset, field.count * sizeof(T));
      return values;
    }
    return {};
  }

 private:
  Layout layout_;
  std::vector<unsigned char> memory_;
};

using Longs = std::vector<std::int64_t>;
using Ints = std::vector<std::int32_t>;

TEST(packs_sequences_end_to_end) {
  const std::vector<Stream> streams{{{11, 12, 13}, {0, 0, 1}}, {{21, 22}, {0, 1}}};
  const Packed packed(ragged(streams, {1, 1}), {0, 1});
  CHECK((packed.get<std::int64_t>("input_ids") == Longs{11, 12, 13, 21, 22}));
  CHECK((packed.get<std::int64_t>("positions") == Longs{0, 1, 2, 0, 1}));
  CHECK((packed.get<std::int64_t>("rows") == Longs{1, 3}));
  CHECK((packed.get<std::int64_t>("targets") == Longs{13, 22}));
  CHECK((packed.get<std::int64_t>("streams") == Longs{0, 1}));
  CHECK((packed.get<std::int64_t>("records") == Longs{0, 1}));
  CHECK((packed.get<std::int32_t>("cu_seqlens_q") == Ints{0, 3, 5}));
  CHECK((packed.get<std::int32_t>("cu_rows") == Ints{0, 1, 2}));
  CHECK((packed.get<std::int32_t>("segments") == Ints{0, 1}));
  CHECK(packed.get<std::int64_t>("key_index").empty());
}

TEST(shares_a_prefix) {
  const std::vector<Stream> streams{{{1, 2, 3, 4}, {0, 0, 1, 1}}, {{1, 2, 5}, {0, 0, 1}}};
  const Ragged made = ragged(streams, {2}, true);
  CHECK(made.tokens().at(0) == 5 && made.rows().at(0) == 3);
  CHECK(made.pairs().at(0) == 3 + (3 + 4) + 3);
  const Packed packed(made, {0});
  CHECK((packed.get<std::int64_t>("input_ids") == Longs{1, 2, 3, 4, 5}));
  CHECK((packed.get<std::int64_t>("positions") == Longs{0, 1, 2, 3, 2}));
  CHECK((packed.get<std::int64_t>("rows") == Longs{1, 2, 1}));
  CHECK((packed.get<std::int64_t>("targets") == Longs{3, 4, 5}));
  CHECK((packed.get<std::int64_t>("key_index") == Longs{0, 1, 0, 1, 2, 3, 0, 1, 4}));
  CHECK((packed.get<std::int32_t>("cu_seqlens_q") == Ints{0, 2, 4, 5}));
  CHECK((packed.get<std::int32_t>("cu_seqlens_k") == Ints{0, 2, 6, 9}));
  CHECK((packed.get<std::int32_t>("segments") == Ints{1, 2}));
}

TEST(shares_a_prompt_between_examples) {
  const std::vector<Stream> streams{
      {{1, 2, 3}, {0, 0, 1}}, {{7, 8}, {0, 1}}, {{1, 2, 4, 5}, {0, 0, 1, 1}}};
  const Ragged made = ragged(streams, {1, 1, 1}, true);
  const Packed packed(made, {0, 2, 1});
  CHECK((packed.get<std::int64_t>("input_ids") == Longs{1, 2, 3, 4, 5, 7, 8}));
  CHECK((packed.get<std::int64_t>("rows") == Longs{1, 1, 3, 5}));
  CHECK((packed.get<std::int64_t>("records") == Longs{0, 1, 2}));
  CHECK((packed.get<std::int64_t>("key_index") == Longs{0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6}));
  CHECK((packed.get<std::int32_t>("cu_seqlens_q") == Ints{0, 2, 3, 5, 7}));
  CHECK((packed.get<std::int32_t>("segments") == Ints{1, 2, 3}));
  CHECK((made.plan(5, 1, {1, 0, 0}) == fastalign::Plan{{{0, 2}, {1}}}));
  // Without room for both they are cut.
  CHECK((made.plan(4, 1, {1, 0, 0}) == fastalign::Plan{{{2}, {0}, {1}}}));
}

TEST(names_a_negative_token) {
  const std::vector<Stream> streams{{{1, -5}, {0, 1}}};
  CHECK(MESSAGE_OF(InvalidInput, Packed(ragged(streams, {1}), {0})) ==
        "input_ids[0][1] is -5; token ids are not negative");
}

TEST(writes_nothing_beside_the_pack_when_masks_change) {
  std::vector<Stream> streams{{Ints(100, 7), std::vector<std::uint8_t>(100)}};
  for (std::size_t t = 1; t < 100; t += 3) streams[0].mask[t] = 1;
  const Ragged made = ragged(streams, {1});
  for (const std::uint8_t value : {0, 1}) {
    std::memset(streams[0].mask.data(), value, 100);
    CHECK(MESSAGE_OF(InvalidInput, Packed(made, {0})) ==
          "loss_mask[0] was changed while it was packed");
  }
}

// Whatever becomes of tokens and masks behind the packer's back: the memory of Packed is exactly as
// long as the pack, so that the address sanitizer sees a write beside it.
TEST(survives_any_change_of_its_arrays) {
  std::mt19937 random(0);
  const auto below = [&random](std::uint32_t end) { return random() % end; };
  int packed = 0, refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<Stream> streams;
    std::vector<std::int64_t> counts, order;
    for (std::uint32_t e = 0; e < 1 + below(4); ++e) {
      const std::uint32_t count = 1 + below(3);
      for (std::uint32_t s = 0; s < count; ++s) {
        const std::uint32_t length = 1 + below(40);
        Stream stream{Ints(length), std::vector<std::uint8_t>(length)};
        for (std::int32_t& id : stream.ids) id = static_cast<std::int32_t>(below(2));
        const std::uint32_t rarely = 1 + below(20);
        for (std::size_t t = 1; t < length; ++t) stream.mask[t] = below(rarely) == 0;
        streams.push_back(stream);
      }
      counts.push_back(count);
      order.insert(order.begin(), e);
    }
    const Ragged made = ragged(streams, counts, round % 2 == 0);
    const Packed untouched(made, order);
    for (std::uint32_t change = below(4); change > 0; --change) {
      Stream& stream = streams[below(static_cast<std::uint32_t>(streams.size()))];
      const std::size_t t = below(static_cast<std::uint32_t>(stream.ids.size()));
      stream.ids[t] = static_cast<std::int32_t>(below(4)) - (below(8) == 0);
      stream.mask[below(static_cast<std::uint32_t>(stream.mask.size()))] ^= 1;
    }
    try {
      const Packed again(made, order);
      ++packed;
    } catch (const InvalidInput&) {
      ++refused;
    }
  }
  CHECK(packed > 500 && refused > 500);
}

TEST(packs_from_several_threads_at_once) {
  std::vector<Stream> streams;
  for (std::int32_t s = 0; s < 64; ++s) streams.push_back({{s, 1, 2}, {0, 1, 1}});
  const Ragged made = ragged(streams, Longs(64, 1));
  std::vector<std::thread> threads;
  std::vector<std::int64_t> firsts(4);
  for (std::size_t i = 0; i < firsts.size(); ++i) {
    threads.emplace_back([&made, &firsts, i] {
      const Packed packed(made, {static_cast<std::int64_t>(16 * i), 0});
      firsts[i] = packed.get<std::int64_t>("input_ids").front();
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK((firsts == Longs{0, 16, 32, 48}));
}

TEST(plans_as_many_packs_for_every_rank) {
  const auto plan = fastalign::plan({5, 4, 12, 6, 3, 7, 5}, {5, 4, 12, 6, 3, 7, 5}, 10, 2);
  CHECK((plan == fastalign::Plan{{{2}, {0, 6}}, {{4, 5}, {1, 3}}}));
}

TEST(plans_by_cost) {
  const auto plan = fastalign::plan({8, 4, 4, 4, 4}, {64, 16, 16, 16, 16}, 100, 2);
  CHECK((plan == fastalign::Plan{{{0}}, {{1, 2, 3, 4}}}));
}

TEST(swaps_single_examples_until_packs_are_even) {
  // Longest first, they would be 5 3 2 | 4 4.
  const auto plan = fastalign::plan({2, 4, 4, 5, 3}, {2, 4, 4, 5, 3}, 10, 2);
  CHECK((plan == fastalign::Plan{{{0, 1, 4}}, {{2, 3}}}));
}

}  // namespace
