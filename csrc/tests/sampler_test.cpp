#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "exp_log.h"
#include "invalid_input.h"
#include "philox.h"
#include "stop_matcher.h"

namespace {

using fastalign::Draws;
using fastalign::InvalidInput;
using fastalign::Isa;
using fastalign::LogitsType;
using fastalign::LogitsView;
using fastalign::SamplingRule;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Result {
  std::vector<std::int32_t> token_ids;
  std::vector<float> logprobs, sampling_logprobs;

  bool operator==(const Result& other) const {
    return token_ids == other.token_ids && same_bits(logprobs, other.logprobs) &&
           same_bits(sampling_logprobs, other.sampling_logprobs);
  }

  static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

Result draw(const LogitsView& view, const SamplingRule& rule, Isa isa, std::size_t threads = 1) {
  std::vector<std::uint64_t> seeds(view.rows), positions(view.rows);
  for (std::size_t row = 0; row < view.rows; ++row) {
    seeds[row] = 0x123456789ULL * row;
    positions[row] = 3 + row;
  }
  Result result{std::vector<std::int32_t>(view.rows), std::vector<float>(view.rows),
                std::vector<float>(view.rows)};
  fastalign::sample(
      view, seeds.data(), positions.data(), rule, threads, isa,
      Draws{result.token_ids.data(), result.logprobs.data(), result.sampling_logprobs.data()});
  return result;
}

LogitsView rows_of(const std::vector<float>& logits, std::size_t rows) {
  const std::size_t vocab_size = logits.size() / rows;
  return {logits.data(), LogitsType::kFloat32, rows, vocab_size,
          static_cast<std::ptrdiff_t>(vocab_size)};
}

Result draw_portable(const std::vector<float>& logits, const SamplingRule& rule,
                     std::size_t rows = 1) {
  return draw(rows_of(logits, rows), rule, Isa::kPortable);
}

std::vector<float> random_logits(std::size_t count, float spread) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> logits(count);
  for (float& value : logits) value = normal(generator);
  return logits;
}

const std::vector<SamplingRule> kRules{
    {},
    {0.0, 0, 1.0, 0.0},
    {0.7, 0, 1.0, 0.0},
    {0.01, 0, 1.0, 0.0},
    {1e6, 0, 1.0, 0.0},
    {1.0, 1, 1.0, 0.0},
    {1.0, 50, 1.0, 0.0},
    {1.0, 900, 1.0, 0.0},
    {1.0, 0, 0.9, 0.0},
    {1.0, 0, 1e-9, 0.0},
    {1.0, 0, 0.999999, 0.0},
    {1.0, 0, 1.0, 0.05},
    {1.0, 0, 1.0, 1.0},
    {1.0, 0, 1.0, 1e-300},
    {1.0, 0, 0.95, 1e-4},
    {1.3, 40, 0.8, 0.02},
};

// The vectors published with Random123 (kat_vectors).
TEST(philox_gives_the_published_numbers) {
  using Counter = fastalign::PhiloxCounter;
  CHECK((fastalign::philox4x32({0, 0, 0, 0}, {0, 0}) ==
         Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK((fastalign::philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                               {0xffffffff, 0xffffffff}) ==
         Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((fastalign::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                               {0xa4093822, 0x299f31d0}) ==
         Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(uniforms_are_below_one_and_differ_by_every_bit_of_seed_and_position) {
  std::vector<double> seen{fastalign::philox_uniform(0, 0)};
  for (int bit = 0; bit < 64; ++bit) {
    seen.push_back(fastalign::philox_uniform(std::uint64_t{1} << bit, 0));
    seen.push_back(fastalign::philox_uniform(0, std::uint64_t{1} << bit));
  }
  std::sort(seen.begin(), seen.end());
  CHECK(seen.front() >= 0.0 && seen.back() < 1.0);
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
}

TEST(exp_and_log_are_those_of_the_library_but_for_the_last_bits) {
  for (double x = 0.0; x > -699.0; x -= 0.0371) {
    CHECK(std::fabs(fastalign::exp_of(x) / std::exp(x) - 1.0) < 5e-16);
  }
  CHECK(fastalign::exp_of(-1e300) == 0.0 && fastalign::exp_of(0.0) == 1.0);
  for (double x = 1e-300; x < 1e300; x *= 1.7321) {
    CHECK(std::fabs(fastalign::log_of(x) - std::log(x)) <= 4e-16 * std::fabs(std::log(x)));
  }
  for (double x = 0.5; x < 2.0; x += 0.00137) {
    CHECK(std::fabs(fastalign::log_of(x) - std::log(x)) <= 4e-16);
  }
  CHECK(fastalign::log_of(1.0) == 0.0);
}

TEST(instruction_sets_agree_bit_for_bit) {
  const std::vector<std::size_t> sizes{1, 15, 16, 17, 1023, 1025, 9000};
  for (std::size_t vocab_size : sizes) {
    std::vector<std::vector<float>> kinds{
        random_logits(vocab_size, 1.0f), random_logits(vocab_size, 12.0f),
        random_logits(vocab_size, 1e37f), random_logits(vocab_size, 1e-39f),
        std::vector<float>(vocab_size, -3.25f)};
    std::vector<float> peaked(vocab_size, -kInfinity);
    peaked[vocab_size / 2] = 1e30f;
    kinds.push_back(peaked);
    std::vector<float> steps(vocab_size);
    for (std::size_t i = 0; i < vocab_size; ++i) steps[i] = static_cast<float>(i % 7) * -30.0f;
    kinds.push_back(steps);
    std::vector<float> falling(vocab_size);
    for (std::size_t i = 0; i < vocab_size; ++i) falling[i] = -static_cast<float>(i) / 200.0f;
    kinds.push_back(falling);
    for (const std::vector<float>& logits : kinds) {
      for (const SamplingRule& rule : kRules) {
        std::vector<std::uint16_t> halves(vocab_size);
        for (std::size_t i = 0; i < vocab_size; ++i) {
          std::uint32_t bits;
          std::memcpy(&bits, &logits[i], sizeof bits);
          halves[i] = static_cast<std::uint16_t>(bits >> 16);
        }
        // The same row twice, under two seeds.
        const LogitsView views[] = {{logits.data(), LogitsType::kFloat32, 2, vocab_size, 0},
                                    {halves.data(), LogitsType::kBfloat16, 2, vocab_size, 0}};
        for (const LogitsView& view : views) {
          const Result expected = draw(view, rule, Isa::kPortable);
          for (Isa isa : fastalign::supported_isas()) CHECK(draw(view, rule, isa) == expected);
        }
      }
    }
  }
}

TEST(threads_change_nothing) {
  // Rows that overlap, so that there are enough logits for four threads.
  const std::vector<float> logits = random_logits(70000, 3.0f);
  const LogitsView view{logits.data(), LogitsType::kFloat32, 80, 60000, 100};
  for (const SamplingRule& rule : {SamplingRule{}, SamplingRule{0.9, 50, 0.9, 0.0}}) {
    const Isa isa = fastalign::supported_isas().back();
    CHECK(draw(view, rule, isa, 4) == draw(view, rule, isa));
  }
}

TEST(greedy_takes_the_first_of_the_largest) {
  std::vector<float> logits(5000, 1.0f);
  logits[1500] = logits[1501] = logits[4000] = 2.0f;
  const Result result = draw_portable(logits, {0.0, 0, 1.0, 0.0});
  CHECK(result.token_ids[0] == 1500);
  CHECK(result.sampling_logprobs[0] == 0.0f);
}

TEST(ties_at_a_border_go_to_the_lower_id) {
  // Of three equal tokens top-k 2 keeps the first two, and so does a nucleus of half of them.
  const std::vector<float> logits{0.0f, 5.0f, 5.0f, 5.0f, -kInfinity};
  std::vector<std::uint64_t> seeds(200), positions(200);
  for (std::size_t i = 0; i < seeds.size(); ++i) seeds[i] = i;
  const LogitsView view{logits.data(), LogitsType::kFloat32, 200, 5, 0};
  for (const SamplingRule& rule :
       {SamplingRule{1.0, 2, 1.0, 0.0}, SamplingRule{1.0, 0, 0.5, 0.0}}) {
    Result result{std::vector<std::int32_t>(200), std::vector<float>(200), std::vector<float>(200)};
    fastalign::sample(
        view, seeds.data(), positions.data(), rule, 1, Isa::kPortable,
        Draws{result.token_ids.data(), result.logprobs.data(), result.sampling_logprobs.data()});
    std::sort(result.token_ids.begin(), result.token_ids.end());
    CHECK(result.token_ids.front() == 1 && result.token_ids.back() == 2);
    CHECK(std::fabs(result.sampling_logprobs[0] - std::log(0.5f)) < 1e-6f);
  }
}

TEST(a_nucleus_beyond_the_first_candidates_ends_at_the_right_token) {
  // Falling logits, ten equal ones at a time: the nucleus is the ids below `kept`.
  std::vector<float> logits(10000);
  double total = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = -1e-4f * static_cast<float>(i / 10);
    total += std::exp(static_cast<double>(logits[i]));
  }
  std::size_t kept = 0;
  double sum = 0.0;
  while (sum < 0.5 * total) sum += std::exp(static_cast<double>(logits[kept++]));

  std::vector<std::uint64_t> seeds(200), positions(200);
  for (std::size_t i = 0; i < seeds.size(); ++i) seeds[i] = i;
  for (Isa isa : fastalign::supported_isas()) {
    Result result{std::vector<std::int32_t>(200), std::vector<float>(200), std::vector<float>(200)};
    fastalign::sample(
        {logits.data(), LogitsType::kFloat32, 200, 10000, 0}, seeds.data(), positions.data(),
        {1.0, 0, 0.5, 0.0}, 1, isa,
        Draws{result.token_ids.data(), result.logprobs.data(), result.sampling_logprobs.data()});
    const auto last = *std::max_element(result.token_ids.begin(), result.token_ids.end());
    CHECK(static_cast<std::size_t>(last) < kept && last > 4500);
    for (std::size_t i = 0; i < 200; ++i) {
      const double logit = logits[static_cast<std::size_t>(result.token_ids[i])];
      // One token more or less would be 2e-4.
      CHECK(std::fabs(result.sampling_logprobs[i] - (logit - std::log(sum))) < 2e-6);
      CHECK(std::fabs(result.logprobs[i] - (logit - std::log(total))) < 2e-6);
    }
  }
}

TEST(names_the_first_bad_row) {
  std::vector<float> logits = random_logits(4 * 3000, 1.0f);
  logits[3 * 3000 + 5] = kInfinity;
  CHECK(MESSAGE_OF(InvalidInput, draw_portable(logits, {}, 4)) ==
        "logits[3][5] is +infinity; logits are numbers or -infinity");
  logits[1 * 3000 + 2999] = kNaN;
  for (const SamplingRule& rule : kRules) {
    for (Isa isa : fastalign::supported_isas()) {
      CHECK(MESSAGE_OF(InvalidInput, draw(rows_of(logits, 4), rule, isa)) ==
            "logits[1][2999] is NaN; logits are numbers or -infinity");
    }
  }
  std::fill(logits.begin(), logits.begin() + 3000, -kInfinity);
  CHECK(MESSAGE_OF(InvalidInput, draw_portable(logits, {}, 4)) ==
        "logits[0] is -infinity everywhere; no token can be drawn");
  logits[17] = kNaN;
  CHECK(MESSAGE_OF(InvalidInput, draw_portable(logits, {}, 4)) ==
        "logits[0][17] is NaN; logits are numbers or -infinity");
}

TEST(refuses_rules_that_cannot_be) {
  const std::vector<float> logits{1.0f, 2.0f};
  CHECK(MESSAGE_OF(InvalidInput, draw_portable(logits, {-1.0, 0, 1.0, 0.0})) ==
        "temperature is -1.000000; it is 0 (greedy) or from 1e-6 to 1e6");
  CHECK(MESSAGE_OF(InvalidInput, draw_portable(logits, {1.0, 0, 0.0, 0.0})) ==
        "top_p is 0.000000; it is above 0 and at most 1");
  CHECK(MESSAGE_OF(InvalidInput, draw_portable(logits, {1.0, 0, 1.0, 1.5})) ==
        "min_p is 1.500000; it is from 0 to 1");
  CHECK(MESSAGE_OF(InvalidInput, draw_portable({}, {})) ==
        "logits has 0 columns; a row has from 1 to 2147483647 tokens");
}

fastalign::StopMatcher matcher(std::vector<std::string> tokens, std::vector<std::string> stop,
                               std::size_t rows) {
  auto table = std::make_shared<fastalign::TokenBytes>();
  table->by_id = std::move(tokens);
  return {std::move(table), std::move(stop), rows};
}

bool push(fastalign::StopMatcher* to, std::int64_t row, std::int32_t id) {
  bool ended = false;
  to->push(&row, &id, 1, &ended);
  return ended;
}

TEST(stop_strings_are_found_across_tokens) {
  auto stops =
      matcher({"ab", "c", "", "xxabcabd", "\xe2\x82", "\xac"}, {"abcabd", "\xe2\x82\xac"}, 2);
  for (std::int32_t id : {0, 1, 0, 1, 2, 0}) CHECK(!push(&stops, 0, id));
  CHECK(!push(&stops, 1, 4));
  CHECK(push(&stops, 1, 5));
  CHECK(push(&stops, 0, 3));
  // Beyond the table there is no text.
  CHECK(!push(&stops, 1, 6));
}

TEST(a_match_that_fell_over_itself_is_found) {
  // After "aab" fails at the third a, the second one still begins a match.
  auto stops = matcher({"a", "b"}, {"aab"}, 1);
  for (std::int32_t id : {0, 0, 0, 0}) CHECK(!push(&stops, 0, id));
  CHECK(push(&stops, 0, 1));
}

TEST(stop_matcher_refuses_what_it_has_no_row_for) {
  auto stops = matcher({"a"}, {"b"}, 1);
  CHECK(MESSAGE_OF(InvalidInput, push(&stops, 1, 0)) == "rows[0] is 1; there are 1 rows");
  CHECK(MESSAGE_OF(InvalidInput, push(&stops, 0, -1)) ==
        "token_ids[0] is -1; token ids are not negative");
  CHECK(MESSAGE_OF(InvalidInput, matcher({"a"}, {"b", ""}, 1)) ==
        "stop[1] is empty; it would always match");
}

}  // namespace
