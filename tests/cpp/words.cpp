// The raw 32-bit words behind the noise, without end, on the standard output: for a battery of
// tests that reads a file of bits, such as dieharder. Compiled by test_statistics.py.
//
//   words counters SEED OFFSET    the blocks at OFFSET, OFFSET + 1, ... of one key
//   words seeds SEED OFFSET       the block at OFFSET of the seeds SEED, SEED + 1, ...
//
// A block is four words, in the order of their lanes; numbers are decimal.
#include <string>
#include <vector>

#include "lanes.h"

#include "../../csrc/common/philox.h"

using namespace reparam_fused;

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const bool by_seed = std::string(argv[1]) == "seeds";
  uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  uint64_t offset = std::strtoull(argv[3], nullptr, 10);
  std::vector<PhiloxBlock<Scalar>> blocks(4096);
  do {
    for (auto& block : blocks) {
      const auto low = static_cast<uint32_t>(offset), high = static_cast<uint32_t>(offset >> 32);
      block = philox4x32_10<Scalar>({low, high, 0, 0}, OneSeed<Scalar>(seed));
      ++(by_seed ? seed : offset);
    }
  } while (std::fwrite(blocks.data(), sizeof(blocks[0]), blocks.size(), stdout) == blocks.size());
}
