#include "sampler.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "exp_log.h"
#include "invalid_input.h"
#include "philox.h"

namespace fastalign {
namespace {

constexpr std::size_t kLanes = 16;
// Logits that are worked on at once: 4 KiB, which stay in the nearest cache between two loops.
constexpr std::size_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeastExponent = -87.5f;
constexpr float kRound = 0x1.8p23f;  // added, it leaves no room for a fraction
constexpr std::uint32_t kRoundBits = 0x4B400000;

// Bins of the histogram for wide nuclei and their number in one unit of the tempered logits. What
// is further than 64 below the largest shares the last bin.
constexpr std::size_t kBins = 4096;
constexpr float kBinsPerUnit = 64.0f;

// See sampler_kernels.inc.
struct Kernels {
  float (*largest)(const float* x, std::size_t n, float* lane_max);
  double (*sum_weights)(const float* x, std::size_t n, float top, float scale, float least);
  void (*write_weights)(const float* x, std::size_t n, float top, float scale, float least,
                        float* weights);
  void (*write_bins)(const float* x, std::size_t n, float top, float scale, std::int32_t* bins);
  void (*widen)(const std::uint16_t* from, std::size_t n, float* to);
};

namespace portable {
#define TARGET
#define WIDTH 4
#include "sampler_kernels.inc"
#undef WIDTH
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2")))
#define WIDTH 8
#include "sampler_kernels.inc"
#undef WIDTH
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define WIDTH 16
#include "sampler_kernels.inc"
#undef WIDTH
#undef TARGET
}  // namespace avx512
#endif

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return portable::kKernels;
}

// Groups of logits looked at for a nucleus, one number after the other; one that is spread over
// more tokens than they hold is found from a histogram of the whole row.
constexpr std::size_t kNucleusGroups[] = {64, 512};
// A thread is worth its start from about as many logits, which take 0.4 ms and more.
constexpr std::size_t kLogitsPerThread = std::size_t{1} << 20;

struct Candidate {
  float logit;
  std::uint32_t id;
};

// The order in which truncations keep tokens.
bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// What a truncation keeps: the logits above `logit`, and of those equal to it the ids up to `last`.
struct Border {
  float logit = -kInfinity;
  std::size_t last = std::numeric_limits<std::size_t>::max();
};

// The state of one thread: the row at hand, and memory that its rows share.
class RowSampler {
 public:
  RowSampler(const LogitsView& logits, const SamplingRule& rule, const Kernels& kernels)
      : logits_(logits),
        rule_(rule),
        kernels_(kernels),
        blocks_((logits.vocab_size + kBlock - 1) / kBlock),
        scale_(rule.temperature == 0.0 ? 1.0f : static_cast<float>(1.0 / rule.temperature)),
        top_k_(rule.top_k >= 1 && static_cast<std::size_t>(rule.top_k) < logits.vocab_size
                   ? static_cast<std::size_t>(rule.top_k)
                   : 0),
        staged_(kBlock),
        weights_(kBlock),
        bins_of_(kBlock),
        tops_(blocks_),
        raw_(blocks_),
        masses_(blocks_),
        lane_max_(blocks_ * kLanes) {}

  void draw(std::size_t row, double uniform, const Draws& draws) {
    row_ = row;
    scan();
    Candidate drawn;
    double sampling_logprob = 0.0;
    if (rule_.temperature == 0.0) {
      drawn = first_of_the_largest();
    } else {
      const auto [candidate, mass, total] = draw_from_truncated(uniform);
      drawn = candidate;
      sampling_logprob = mass - log_of(total);
    }
    const double above = static_cast<double>(drawn.logit) - static_cast<double>(top_);
    draws.token_ids[row] = static_cast<std::int32_t>(drawn.id);
    draws.logprobs[row] = static_cast<float>(above - log_of(raw_total_));
    draws.sampling_logprobs[row] = static_cast<float>(sampling_logprob);
  }

 private:
  // A token, its tempered logit relative to the largest one, and the weights' sum.
  struct Drawn {
    Candidate token;
    double exponent;
    double total;
  };

  struct Block {
    const float* logits;
    std::size_t padded;  // a multiple of kLanes, filled up with -infinity
  };

  std::size_t start_of(std::size_t block) const { return block * kBlock; }
  std::size_t size_of(std::size_t block) const {
    return std::min(kBlock, logits_.vocab_size - start_of(block));
  }

  const void* row_data() const {
    const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(row_) * logits_.row_stride;
    if (logits_.type == LogitsType::kFloat32) {
      return static_cast<const float*>(logits_.data) + offset;
    }
    return static_cast<const std::uint16_t*>(logits_.data) + offset;
  }

  float logit(std::size_t id) const {
    if (logits_.type == LogitsType::kFloat32) return static_cast<const float*>(row_data())[id];
    const std::uint32_t bits =
        static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(row_data())[id]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // The logits of a block, in place where that is possible.
  Block load(std::size_t block) {
    const std::size_t start = start_of(block), size = size_of(block);
    const std::size_t padded = (size + kLanes - 1) / kLanes * kLanes;
    if (logits_.type == LogitsType::kFloat32) {
      const float* from = static_cast<const float*>(row_data()) + start;
      if (padded == size) return {from, padded};
      std::copy(from, from + size, staged_.data());
    } else {
      kernels_.widen(static_cast<const std::uint16_t*>(row_data()) + start, size, staged_.data());
    }
    std::fill(staged_.data() + size, staged_.data() + padded, -kInfinity);
    return {staged_.data(), padded};
  }

  // The same with what the border shuts out at -infinity; only the block in which equal logits are
  // told apart by their ids has to be copied for that. `least` is what its other logits must reach.
  Block load_kept(std::size_t block, const Border& border, float* least) {
    Block loaded = load(block);
    const std::size_t start = start_of(block), end = start + size_of(block);
    *least = border.logit;
    if (border.last >= end - 1) return loaded;
    if (border.last >= start) {
      if (loaded.logits != staged_.data()) {
        std::copy(loaded.logits, loaded.logits + loaded.padded, staged_.data());
        loaded.logits = staged_.data();
      }
      for (std::size_t i = border.last + 1 - start; i < end - start; ++i) {
        if (staged_[i] == border.logit) staged_[i] = -kInfinity;
      }
    } else {
      *least = std::nextafter(border.logit, kInfinity);
    }
    return loaded;
  }

  double tempered(float logit) const {
    return (static_cast<double>(logit) - static_cast<double>(top_)) / rule_.temperature;
  }

  // The first read of the row: the largest logit of all, of each block and of each lane of a block,
  // and what the weights sum to.
  void scan() {
    const bool truncates = top_k_ != 0 || rule_.min_p > 0.0;
    const bool needs_masses = rule_.temperature != 0.0 && !truncates;
    for (std::size_t block = 0; block < blocks_; ++block) {
      const auto [x, n] = load(block);
      const float top = kernels_.largest(x, n, &lane_max_[block * kLanes]);
      tops_[block] = top;
      if (top == -kInfinity) {
        // Its weights are relative to nothing; it may hide NaN.
        if (std::any_of(x, x + n, [](float value) { return value != -kInfinity; })) refuse();
        raw_[block] = masses_[block] = 0.0;
        continue;
      }
      raw_[block] = kernels_.sum_weights(x, n, top, 1.0f, -kInfinity);
      if (!(raw_[block] < kInfinity)) refuse();
      if (!needs_masses) continue;
      masses_[block] =
          scale_ == 1.0f ? raw_[block] : kernels_.sum_weights(x, n, top, scale_, -kInfinity);
    }
    top_ = *std::max_element(tops_.begin(), tops_.end());
    if (top_ == -kInfinity || top_ == kInfinity) refuse();
    raw_total_ = scale_to_top(&raw_, 1.0);
    if (needs_masses) total_ = scale_to_top(&masses_, rule_.temperature);
  }

  // From weights relative to each block's largest logit to weights relative to the row's.
  double scale_to_top(std::vector<double>* sums, double temperature) const {
    double total = 0.0;
    for (std::size_t block = 0; block < blocks_; ++block) {
      const double below = static_cast<double>(tops_[block]) - static_cast<double>(top_);
      (*sums)[block] *= exp_of(below / temperature);
      total += (*sums)[block];
    }
    return total;
  }

  [[noreturn]] void refuse() const {
    bool empty = true;
    for (std::size_t id = 0; id < logits_.vocab_size; ++id) {
      const float value = logit(id);
      empty = empty && value == -kInfinity;
      if (value < kInfinity) continue;
      throw InvalidInput(item("logits", row_) + "[" + std::to_string(id) + "] is " +
                         (value == kInfinity ? "+infinity" : "NaN") +
                         "; logits are numbers or -infinity");
    }
    if (!empty) refuse_change();
    throw InvalidInput(item("logits", row_) + " is -infinity everywhere; no token can be drawn");
  }

  [[noreturn]] void refuse_change() const {
    throw InvalidInput(item("logits", row_) + " changed while a token was drawn from it");
  }

  Candidate first_of_the_largest() {
    for (std::size_t block = 0; block < blocks_; ++block) {
      if (tops_[block] != top_) continue;
      const std::size_t start = start_of(block);
      for (std::size_t id = start; id < start + size_of(block); ++id) {
        if (logit(id) == top_) return {top_, static_cast<std::uint32_t>(id)};
      }
    }
    refuse_change();
  }

  Drawn draw_from_truncated(double uniform) {
    Border border;
    if (rule_.min_p > 0.0) border.logit = min_p_border();
    if (top_k_ != 0) {
      rank(std::max(border.logit, lane_max_of_rank(top_k_)));
      take(top_k_, std::numeric_limits<double>::infinity());
      if (rule_.top_p < 1.0) cut_nucleus(rule_.top_p * sum_of_ranked());
      return draw_from_ranked(uniform);
    }
    if (rule_.min_p > 0.0) sum_masses(border);
    if (rule_.top_p < 1.0) {
      const double target = rule_.top_p * total_;
      for (std::size_t groups : kNucleusGroups) {
        rank(std::max(border.logit, lane_max_of_rank(groups)));
        const double mass = take(candidates_.size(), target);
        if (mass >= target) return draw_from_ranked(uniform);
        if (mass < 0.5 * target) break;  // too flat for the next number as well
      }
      border = nucleus_border(border, target);
      sum_masses(border);
    }
    return draw_from_blocks(border, uniform);
  }

  // The least float that min-p keeps: p >= min_p * max p, in logits.
  float min_p_border() const {
    const double exact = static_cast<double>(top_) + rule_.temperature * log_of(rule_.min_p);
    const auto rounded = static_cast<float>(exact);
    return static_cast<double>(rounded) < exact ? std::nextafter(rounded, kInfinity) : rounded;
  }

  // The largest logit of the group that ranks `count`-th by it, groups being the lanes of blocks:
  // at least so many logits are not below it. -infinity where there are fewer groups.
  float lane_max_of_rank(std::size_t count) {
    if (count > lane_max_.size()) return -kInfinity;
    sorted_ = lane_max_;
    const auto at = sorted_.begin() + static_cast<std::ptrdiff_t>(count - 1);
    std::nth_element(sorted_.begin(), at, sorted_.end(), std::greater<float>());
    return *at;
  }

  // Makes a heap of all logits that are not below `least`, from the groups that hold any, and
  // nothing ranked yet.
  void rank(float least) {
    candidates_.clear();
    ranked_.clear();
    for (std::size_t group = 0; group < lane_max_.size(); ++group) {
      if (lane_max_[group] < least || lane_max_[group] == -kInfinity) continue;
      const std::size_t block = group / kLanes;
      const std::size_t end = start_of(block) + size_of(block);
      for (std::size_t id = start_of(block) + group % kLanes; id < end; id += kLanes) {
        const float value = logit(id);
        if (value >= least && value > -kInfinity) {
          candidates_.push_back({value, static_cast<std::uint32_t>(id)});
        }
      }
    }
    std::make_heap(candidates_.begin(), candidates_.end(), ranks_after);
  }

  static bool ranks_after(const Candidate& a, const Candidate& b) { return ranks_before(b, a); }

  // Moves candidates to `ranked_` in their order until there are `count` of them or their weights
  // sum to `target`; returns that sum.
  double take(std::size_t count, double target) {
    double sum = 0.0;
    while (ranked_.size() < count && sum < target && !candidates_.empty()) {
      std::pop_heap(candidates_.begin(), candidates_.end(), ranks_after);
      const Candidate next = candidates_.back();
      candidates_.pop_back();
      const double exponent = tempered(next.logit);
      ranked_.push_back({next, exponent, exp_of(std::min(exponent, 0.0))});
      sum += ranked_.back().weight;
    }
    return sum;
  }

  double sum_of_ranked() const {
    double sum = 0.0;
    for (const Ranked& each : ranked_) sum += each.weight;
    return sum;
  }

  void cut_nucleus(double target) {
    double sum = 0.0;
    for (std::size_t i = 0; i < ranked_.size(); ++i) {
      sum += ranked_[i].weight;
      if (sum < target) continue;
      ranked_.resize(i + 1);
      return;
    }
  }

  Drawn draw_from_ranked(double uniform) const {
    if (ranked_.empty()) refuse_change();
    const double total = sum_of_ranked();
    const double target = uniform * total;
    const Ranked* drawn = nullptr;
    double sum = 0.0;
    for (const Ranked& each : ranked_) {
      if (each.weight == 0.0) continue;
      drawn = &each;
      sum += each.weight;
      if (sum > target) break;
    }
    if (drawn == nullptr) refuse_change();
    return {drawn->token, drawn->exponent, total};
  }

  // What the border keeps of each block; blocks that it shuts out are not read.
  void sum_masses(const Border& border) {
    for (std::size_t block = 0; block < blocks_; ++block) {
      masses_[block] = 0.0;
      if (tops_[block] < border.logit || tops_[block] == -kInfinity) continue;
      float least;
      const auto [x, n] = load_kept(block, border, &least);
      masses_[block] = kernels_.sum_weights(x, n, tops_[block], scale_, least);
    }
    total_ = scale_to_top(&masses_, rule_.temperature);
  }

  // Of what `outer` keeps, the end of the nucleus with `target` weight, where that is not among
  // the first candidates: two more reads of the row. Bins follow the order of the logits, so all
  // but one of them are wholly inside or outside.
  Border nucleus_border(const Border& outer, double target) {
    bins_.assign(kBins, 0.0);
    for (std::size_t block = 0; block < blocks_; ++block) {
      if (tops_[block] < outer.logit || tops_[block] == -kInfinity) continue;
      const auto [x, n] = load(block);
      kernels_.write_weights(x, n, top_, scale_, outer.logit, weights_.data());
      kernels_.write_bins(x, n, top_, scale_ * kBinsPerUnit, bins_of_.data());
      for (std::size_t i = 0; i < size_of(block); ++i) {
        bins_[static_cast<std::size_t>(bins_of_[i])] += static_cast<double>(weights_[i]);
      }
    }
    double above = 0.0;
    std::size_t bin = 0;
    while (bin + 1 < kBins && above + bins_[bin] < target) above += bins_[bin++];

    rank_bin(static_cast<std::int32_t>(bin), outer.logit);
    take(candidates_.size(), target - above);
    // An empty bin, where rounding left a little of the target, keeps the whole of what is above.
    if (ranked_.empty()) return outer;
    return {ranked_.back().token.logit, ranked_.back().token.id};
  }

  void rank_bin(std::int32_t bin, float least) {
    candidates_.clear();
    ranked_.clear();
    for (std::size_t block = 0; block < blocks_; ++block) {
      if (tops_[block] < least || tops_[block] == -kInfinity) continue;
      const auto [x, n] = load(block);
      kernels_.write_bins(x, n, top_, scale_ * kBinsPerUnit, bins_of_.data());
      const std::size_t start = start_of(block);
      for (std::size_t i = 0; i < size_of(block); ++i) {
        if (bins_of_[i] == bin && x[i] >= least && x[i] > -kInfinity) {
          candidates_.push_back({x[i], static_cast<std::uint32_t>(start + i)});
        }
      }
    }
    std::make_heap(candidates_.begin(), candidates_.end(), ranks_after);
  }

  // The block by the blocks' sums, then the token by one more read of that block.
  Drawn draw_from_blocks(const Border& border, double uniform) {
    double target = uniform * total_;
    std::size_t block = blocks_;
    double before = 0.0, sum = 0.0;
    for (std::size_t b = 0; b < blocks_; ++b) {
      if (masses_[b] == 0.0) continue;
      block = b;
      before = sum;
      sum += masses_[b];
      if (sum > target) break;
    }
    if (block == blocks_) refuse_change();

    float least;
    const auto [x, n] = load_kept(block, border, &least);
    kernels_.write_weights(x, n, tops_[block], scale_, least, weights_.data());
    target = (target - before) / exp_of(tempered(tops_[block]));
    std::size_t drawn = n;
    sum = 0.0;
    for (std::size_t i = 0; i < size_of(block); ++i) {
      if (weights_[i] == 0.0f) continue;
      drawn = i;
      sum += static_cast<double>(weights_[i]);
      if (sum > target) break;
    }
    if (drawn == n) refuse_change();
    const Candidate token{x[drawn], static_cast<std::uint32_t>(start_of(block) + drawn)};
    return {token, tempered(token.logit), total_};
  }

  struct Ranked {
    Candidate token;
    double exponent;
    double weight;
  };

  const LogitsView logits_;
  const SamplingRule rule_;
  const Kernels& kernels_;
  const std::size_t blocks_;
  const float scale_;
  const std::size_t top_k_;  // 0: off

  std::size_t row_ = 0;
  float top_ = 0.0f;
  double raw_total_ = 0.0;  // of the weights at temperature 1, relative to the largest logit
  double total_ = 0.0;      // of masses_
  std::vector<float> staged_, weights_;  // of the block at hand
  std::vector<std::int32_t> bins_of_;
  std::vector<float> tops_;  // by block
  std::vector<double> raw_, masses_;
  std::vector<float> lane_max_, sorted_;
  std::vector<Candidate> candidates_;
  std::vector<Ranked> ranked_;
  std::vector<double> bins_;
};

void check(const LogitsView& logits, const SamplingRule& rule, Isa isa) {
  if (logits.vocab_size < 1 ||
      logits.vocab_size > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max())) {
    throw InvalidInput("logits has " + std::to_string(logits.vocab_size) +
                       " columns; a row has from 1 to 2147483647 tokens");
  }
  // Within these a difference of logits times 1 / temperature is zero, a number or -infinity.
  if (rule.temperature != 0.0 && !(rule.temperature >= 1e-6 && rule.temperature <= 1e6)) {
    throw InvalidInput("temperature is " + std::to_string(rule.temperature) +
                       "; it is 0 (greedy) or from 1e-6 to 1e6");
  }
  if (!(rule.top_p > 0.0 && rule.top_p <= 1.0)) {
    throw InvalidInput("top_p is " + std::to_string(rule.top_p) + "; it is above 0 and at most 1");
  }
  if (!(rule.min_p >= 0.0 && rule.min_p <= 1.0)) {
    throw InvalidInput("min_p is " + std::to_string(rule.min_p) + "; it is from 0 to 1");
  }
  const std::vector<Isa> supported = supported_isas();
  if (std::find(supported.begin(), supported.end(), isa) == supported.end()) {
    throw InvalidInput(std::string("isa is ") + isa_name(isa) +
                       ", which this machine does not have");
  }
}

// Default rounding, and subnormal numbers as they are, whatever the thread was set to.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t before_;
};

// Rows shared out among threads one at a time; the error of the first bad row is kept.
class Rows {
 public:
  explicit Rows(std::size_t count) : count_(count), bad_row_(count) {}

  template <typename MakeWorker>
  void run(const MakeWorker& make_worker) {
    std::size_t row = 0;
    try {
      const DefaultArithmetic arithmetic;
      auto work = make_worker();
      while ((row = next_.fetch_add(1)) < count_) {
        try {
          work(row);
        } catch (const InvalidInput&) {
          keep(row);
        }
      }
    } catch (...) {
      keep(0);
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void keep(std::size_t row) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error_ && row >= bad_row_) return;
    bad_row_ = row;
    error_ = std::current_exception();
  }

  const std::size_t count_;
  std::atomic<std::size_t> next_{0};
  std::mutex mutex_;
  std::size_t bad_row_;
  std::exception_ptr error_;
};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas{Isa::kPortable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) isas.push_back(Isa::kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    isas.push_back(Isa::kAvx512);
  }
#endif
  return isas;
}

void sample(const LogitsView& logits, const std::uint64_t* seeds, const std::uint64_t* positions,
            const SamplingRule& rule, std::size_t threads, Isa isa, const Draws& draws) {
  check(logits, rule, isa);
  const Kernels& kernels = kernels_of(isa);
  Rows rows(logits.rows);
  const auto work = [&] {
    rows.run([&] {
      return [&, sampler = RowSampler(logits, rule, kernels)](std::size_t row) mutable {
        sampler.draw(row, philox_uniform(seeds[row], positions[row]), draws);
      };
    });
  };
  // A product of 64 bits cannot overflow here: the logits are in memory.
  const std::size_t useful = logits.rows * logits.vocab_size / kLogitsPerThread;
  std::vector<std::thread> helpers;
  const std::size_t workers = std::min({threads, logits.rows, useful});
  helpers.reserve(workers);
  try {
    for (std::size_t i = 1; i < workers; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are to be had; those that there are do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  rows.rethrow();
}

}  // namespace fastalign
