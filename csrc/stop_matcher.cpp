#include "stop_matcher.h"

#include <algorithm>
#include <utility>

#include "invalid_input.h"

namespace fastalign {

StopMatcher::StopMatcher(std::shared_ptr<const TokenBytes> tokens, std::vector<std::string> stop,
                         std::size_t rows)
    : tokens_(std::move(tokens)), stop_(std::move(stop)), tails_(rows) {
  for (std::size_t i = 0; i < stop_.size(); ++i) {
    if (stop_[i].empty()) throw InvalidInput(item("stop", i) + " is empty; it would always match");
    longest_ = std::max(longest_, stop_[i].size());
  }
}

void StopMatcher::push(const std::int64_t* rows, const std::int32_t* token_ids, std::size_t count,
                       bool* ended) {
  for (std::size_t i = 0; i < count; ++i) {
    // Read once: the memory is the caller's.
    const std::int64_t row = rows[i];
    const std::int32_t id = token_ids[i];
    if (row < 0 || static_cast<std::uint64_t>(row) >= tails_.size()) {
      throw InvalidInput(item("rows", i) + " is " + std::to_string(row) + "; there are " +
                         std::to_string(tails_.size()) + " rows");
    }
    if (id < 0) {
      throw InvalidInput(item("token_ids", i) + " is " + std::to_string(id) +
                         "; token ids are not negative");
    }
    const auto index = static_cast<std::size_t>(id);
    ended[i] = index < tokens_->by_id.size() &&
               push(&tails_[static_cast<std::size_t>(row)], tokens_->by_id[index]);
  }
}

bool StopMatcher::push(std::string* tail, const std::string& bytes) const {
  const std::size_t seen = tail->size();
  tail->append(bytes);
  const bool found = std::any_of(stop_.begin(), stop_.end(), [&](const std::string& stop) {
    // Only what ends in the new bytes.
    return tail->find(stop, seen < stop.size() ? 0 : seen - stop.size() + 1) != std::string::npos;
  });
  if (tail->size() >= longest_)
    tail->erase(0, tail->size() - std::max<std::size_t>(longest_, 1) + 1);
  return found;
}

}  // namespace fastalign
