#include "counters.h"

#include <algorithm>
#include <array>

namespace ptx {
namespace {

constexpr int kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;

// Distinct words of the lanes of one group, at most 32 lanes of 4 bytes' worth.
struct Words {
  std::array<uint64_t, kBanks> word;
  int count = 0;
};

Words distinct_words(const uint64_t* addresses, LaneMask lanes, int bytes) {
  Words words;
  const int per_lane = std::max(1, bytes / kBankBytes);
  std::array<uint64_t, kBanks * 4> all;
  int total = 0;
  bool ascending = true;
  for (; lanes; lanes &= lanes - 1) {
    const uint64_t first = addresses[std::countr_zero(lanes)] / kBankBytes;
    for (int k = 0; k < per_lane; ++k) {
      if (total && all[total - 1] > first + k) ascending = false;
      all[total++] = first + k;
    }
  }
  if (!ascending) std::sort(all.begin(), all.begin() + total);
  const auto end = std::unique(all.begin(), all.begin() + total);
  words.count = static_cast<int>(end - all.begin());
  std::copy(all.begin(), end, words.word.begin());
  return words;
}

// Calls body(words) for each group of lanes that is served together.
template <class Body>
void for_each_group(const uint64_t* addresses, LaneMask lanes, int bytes, Body body) {
  const int groups = std::clamp(bytes / kBankBytes, 1, 4);
  const int lanes_per_group = kWarpSize / groups;
  const LaneMask first = lanes_per_group == kWarpSize ? kAllLanes : (1u << lanes_per_group) - 1;
  for (int group = 0; group < groups; ++group) {
    const LaneMask members = lanes & (first << (group * lanes_per_group));
    if (members) body(distinct_words(addresses, members, bytes));
  }
}

}  // namespace

int count_sectors(const uint64_t* addresses, LaneMask lanes, int bytes) {
  std::array<uint64_t, kWarpSize * 4> sectors;
  int total = 0;
  bool ascending = true;
  for (; lanes; lanes &= lanes - 1) {
    const uint64_t address = addresses[std::countr_zero(lanes)];
    for (uint64_t sector = address / kSectorBytes; sector <= (address + bytes - 1) / kSectorBytes; ++sector) {
      if (total && sectors[total - 1] == sector) continue;
      if (total && sectors[total - 1] > sector) ascending = false;
      sectors[total++] = sector;
    }
  }
  if (ascending) return total;
  std::sort(sectors.begin(), sectors.begin() + total);
  return static_cast<int>(std::unique(sectors.begin(), sectors.begin() + total) - sectors.begin());
}

int count_wavefronts(const uint64_t* addresses, LaneMask lanes, int bytes) {
  int wavefronts = 0;
  for_each_group(addresses, lanes, bytes, [&](const Words& words) {
    std::array<uint8_t, kBanks> load = {};
    for (int i = 0; i < words.count; ++i) ++load[words.word[i] % kBanks];
    wavefronts += *std::max_element(load.begin(), load.end());
  });
  return wavefronts;
}

int count_ideal_wavefronts(const uint64_t* addresses, LaneMask lanes, int bytes) {
  int wavefronts = 0;
  for_each_group(addresses, lanes, bytes,
                 [&](const Words& words) { wavefronts += (words.count + kBanks - 1) / kBanks; });
  return wavefronts;
}

}  // namespace ptx
