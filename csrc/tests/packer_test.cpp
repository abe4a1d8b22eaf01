#include "packer.h"

#include <cstdint>
#include <vector>

#include "check.h"
#include "invalid_input.h"

namespace {

using fastalign::InvalidInput;
using fastalign::SequenceView;

SequenceView view(const std::vector<std::int32_t>& ids, const std::vector<std::uint8_t>& mask) {
  return {ids.data(), ids.size(), mask.data(), mask.size()};
}

TEST(packs_sequences_end_to_end) {
  const std::vector<std::int32_t> a{11, 12, 13}, b{21, 22};
  const std::vector<std::uint8_t> mask_a{0, 0, 1}, mask_b{0, 1};
  const auto packed = fastalign::pack({view(a, mask_a), view(b, mask_b)});
  CHECK((packed.input_ids == std::vector<std::int64_t>{11, 12, 13, 21, 22}));
  CHECK((packed.positions == std::vector<std::int64_t>{0, 1, 2, 0, 1}));
  CHECK((packed.cu_seqlens == std::vector<std::int32_t>{0, 3, 5}));
  CHECK((packed.rows == std::vector<std::int64_t>{1, 3}));
  CHECK((packed.targets == std::vector<std::int64_t>{13, 22}));
  CHECK((packed.cu_rows == std::vector<std::int32_t>{0, 1, 2}));
}

TEST(names_a_negative_token) {
  const std::vector<std::int32_t> ids{1, -5};
  const std::vector<std::uint8_t> mask{0, 1};
  CHECK(MESSAGE_OF(InvalidInput, fastalign::pack({view(ids, mask)})) ==
        "input_ids[0][1] is -5; token ids are not negative");
}

TEST(plans_as_many_packs_for_every_rank) {
  const std::vector<std::int64_t> lengths{5, 4, 12, 6, 3, 7, 5};
  const auto plan = fastalign::plan(lengths.data(), lengths.size(), 10, 2);
  CHECK((plan == fastalign::Plan{{{2}, {0, 6}}, {{4, 5}, {1, 3}}}));
}

}  // namespace
