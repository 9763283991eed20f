// What lies under the model: the arena, random numbers, threads, memory, rotation tables.
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "core/arena.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"
#include "model/rope.h"

namespace pgolf::test {
namespace {

void arena() {
  ArenaPlan plan;
  const int a = plan.add("a", 1000, 0, 3), b = plan.add("b", 64, 1, 2), c = plan.add("c", 500, 4, 5);
  const int empty = plan.add("empty", 0, 0, 9), d = plan.add("d", 1, 3, 4);
  const std::size_t total = plan.solve();
  CHECK_EQUAL(plan.buffers()[static_cast<std::size_t>(a)].bytes, std::size_t{1024});
  CHECK_EQUAL(plan.offset(a), std::size_t{0});
  CHECK_EQUAL(plan.offset(b), std::size_t{1024});
  CHECK_EQUAL(plan.offset(c), std::size_t{0});     // a is gone by then
  CHECK_EQUAL(plan.offset(d), std::size_t{1024});  // b is gone, a is not
  CHECK_EQUAL(plan.buffers()[static_cast<std::size_t>(empty)].bytes, std::size_t{0});
  CHECK_EQUAL(total, std::size_t{1088});

  // Whatever lives at the same time lies apart.
  ArenaPlan many;
  const TensorRandom dice(1, "arena");
  for (std::uint64_t i = 0; i < 200; ++i) {
    const int first = static_cast<int>(50 * (1 + dice.uniform(3 * i, 1.0)));
    const int length = static_cast<int>(10 * (1 + dice.uniform(3 * i + 1, 1.0)));
    many.add(std::to_string(i), static_cast<std::size_t>(5000 * (1 + dice.uniform(3 * i + 2, 1.0))), first,
             first + length);
  }
  const std::size_t end = many.solve();
  int overlaps = 0;
  const auto& buffers = many.buffers();
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    overlaps += buffers[i].offset + buffers[i].bytes > end || buffers[i].offset % kAlignment != 0;
    for (std::size_t j = 0; j < i; ++j)
      overlaps += buffers[i].first <= buffers[j].last && buffers[j].first <= buffers[i].last &&
                  buffers[i].offset < buffers[j].offset + buffers[j].bytes &&
                  buffers[j].offset < buffers[i].offset + buffers[i].bytes;
  }
  CHECK_EQUAL(overlaps, 0);
}

void random_numbers() {
  // Random123's published vectors for philox4x32, 10 rounds.
  struct Known {
    PhiloxBlock counter;
    std::array<std::uint32_t, 2> key;
    PhiloxBlock expected;
  };
  constexpr std::uint32_t ones = 0xFFFFFFFF;
  const Known vectors[] = {{{0, 0, 0, 0}, {0, 0}, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
                           {{ones, ones, ones, ones}, {ones, ones}, {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
                           {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
                            {0xA4093822, 0x299F31D0},
                            {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}};
  for (const Known& known : vectors) {
    const PhiloxBlock found = philox4x32(known.counter, known.key);
    for (std::size_t i = 0; i < 4; ++i) CHECK_EQUAL(found[i], known.expected[i]);
  }
  CHECK_EQUAL(crc32("123456789"), 0xCBF43926u);
  CHECK_EQUAL(crc32(""), 0u);
  // tests/reference/rng.py's numbers; the last digit is the machine's logarithm and cosine.
  const TensorRandom dice(42, "tok_emb.weight");
  CHECK_NEAR(dice.normal(0), 1.776865109458507, 1e-14);
  CHECK_NEAR(dice.normal(1), -0.6280733093552718, 1e-14);
  CHECK_NEAR(dice.normal(std::uint64_t{5} << 32), 0.7399969129480517, 1e-14);
  CHECK_EQUAL(TensorRandom(std::uint64_t{42} << 32, "x").uniform(7, 2.0), -1.1616022551479679);
}

void threads() {
  for (const int count : {1, 2, 7}) {
    set_thread_count(count);
    CHECK_EQUAL(thread_count(), count);
    std::vector<int> times(1000);
    parallel_for(1000, [&](std::int64_t i) {
      parallel_for(3, [&](std::int64_t) { ++times[static_cast<std::size_t>(i)]; });  // inside a task: on its thread
    });
    int wrong = 0;
    for (const int t : times) wrong += t != 3;
    CHECK_EQUAL(wrong, 0);
    std::string message;
    try {
      parallel_for(100, [](std::int64_t i) {
        if (i == 3) throw std::runtime_error("task 3");
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK_EQUAL(message, "task 3");
  }
  std::string message;
  try {
    set_thread_count(0);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK_EQUAL(message, "The number of threads is 0; it must be from 1 to 1024.");
}

void subnormals() {
  volatile float tiny = std::numeric_limits<float>::min();
  {
    FlushSubnormals flush;
#if defined(__x86_64__) || defined(__aarch64__)
    CHECK_EQUAL(tiny * 0.5f, 0.0f);
#endif
  }
  CHECK_EQUAL(tiny * 0.5f > 0.0f, true);
}

void memory() {
  const auto before = allocation_count();
  void* block = allocate_aligned(100);
  CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(block) % kAlignment, std::uintptr_t{0});
  CHECK_EQUAL(allocation_count() > before, true);
  free_aligned(block);
}

void rotation_tables() {
  const RopeTables exact = rope_tables(3, 4, 4, 10000.0, false);
  const double angles[] = {0, 0, 1, 0.01, 2, 0.02};  // [position, pair]
  for (std::size_t i = 0; i < 6; ++i) {
    CHECK_NEAR(exact.cos[i], std::cos(angles[i]), 1e-15);
    CHECK_NEAR(exact.sin[i], std::sin(angles[i]), 1e-15);
  }
  const RopeTables rounded = rope_tables(300, 4, 4, 10000.0, true);
  CHECK_EQUAL(rounded.cos[2], 0.5390625);               // cos 1 to 8 bits
  CHECK_EQUAL(rounded.sin[2 * 257], rounded.sin[512]);  // position 257 is 256 in bfloat16
  const RopeTables part = rope_tables(3, 8, 4, 10000.0, false);
  for (std::size_t i = 0; i < 6; ++i) {
    CHECK_EQUAL(part.cos[i / 2 * 4 + i % 2], exact.cos[i]);
    CHECK_EQUAL(part.cos[i / 2 * 4 + i % 2 + 2], 1.0);
    CHECK_EQUAL(part.sin[i / 2 * 4 + i % 2 + 2], 0.0);
  }
}

}  // namespace

void test_core() {
  arena();
  random_numbers();
  threads();
  subnormals();
  memory();
  rotation_tables();
}

}  // namespace pgolf::test
