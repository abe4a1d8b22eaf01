// Writes seeds for journal_fuzz into a folder: journals of a store, whole, cut and damaged, each as
// a file and as a recipe.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "journal.h"
#include "store.h"

namespace {

using namespace fastalign;
using Bytes = std::vector<std::uint8_t>;

Bytes journal_of(const std::string& path, int rollouts, bool committed) {
  std::filesystem::remove(path);
  {
    Store store(path, 0, 0);
    const std::int32_t prompt[] = {1, 2, 3};
    if (rollouts > 0) {
      store.append_prompt(prompt, 3);
      store.append_settings("{}", 2);
    }
    for (int i = 0; i < rollouts; ++i) {
      NewRollout rollout({0, 0, static_cast<std::uint64_t>(i), 1, Finish::stop}, 3);
      for (int t = 0; t < 3; ++t) {
        rollout.token_ids()[t] = t;
        rollout.logprobs()[t] = -1;
      }
      const std::int64_t index = store.append(std::move(rollout), std::nullopt, [] {});
      store.annotate(index, "good", 4);
      if (committed) store.commit();
    }
  }
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// The recipe that makes the same entries, with this first damage.
Bytes recipe_of(const Bytes& file, const Bytes& damage) {
  Bytes recipe{1, static_cast<std::uint8_t>(damage.empty() ? 0 : 1)};
  recipe.insert(recipe.end(), damage.begin(), damage.end());
  read_journal(file.data(), file.size(), "seed", [&](const EntryView& entry) {
    recipe.push_back(static_cast<std::uint8_t>(entry.kind));
    recipe.push_back(static_cast<std::uint8_t>(entry.size));
    recipe.insert(recipe.end(), entry.payload, entry.payload + entry.size);
  });
  // A mark that says that the first two entries were committed.
  const Bytes mark{kMark, 8, 96, 0, 0, 0, 0, 0, 0, 0};
  recipe.insert(recipe.end(), mark.begin(), mark.end());
  return recipe;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const std::filesystem::path folder = arguments[1];
  std::filesystem::create_directories(folder);
  const std::string path = folder / ".journal";
  int seeds = 0;
  const auto write = [&](const Bytes& seed) {
    std::ofstream file(folder / ("seed-" + std::to_string(seeds++)), std::ios::binary);
    file.write(reinterpret_cast<const char*>(seed.data()),
               static_cast<std::streamsize>(seed.size()));
  };
  for (const int rollouts : {0, 1, 4}) {
    for (const bool committed : {false, true}) {
      Bytes file = journal_of(path, rollouts, committed);
      write(recipe_of(file, {}));
      write(recipe_of(file, {40, 0, 1}));   // a flipped bit before the mark
      write(recipe_of(file, {200, 0, 1}));  // and one behind what it covers
      write(recipe_of(file, {150, 0, 0}));  // a cut
      file.insert(file.begin(), 0);
      write(file);
      file[file.size() / 2] ^= 1;
      write(file);
      file.resize(file.size() - 5);
      write(file);
    }
  }
  std::filesystem::remove(path);
}
