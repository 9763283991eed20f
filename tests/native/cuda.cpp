// What the CUDA backend decides and computes without a GPU: which kernels run, and places in matrices.
#include <array>
#include <map>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/iteration_tiles.h"
#include "cuda/kernel_set.h"

namespace pgolf::test {
namespace {

using namespace cuda;

// wgmma and TMA run in code for sm_90a's own features and nowhere else: not in sm_90's portable code, and not on a GPU
// that comes later.
void kernel_sets() {
  CHECK_EQUAL(has_wgmma(kernel_set_of(900, true)), true);
  CHECK_EQUAL(has_bf16(kernel_set_of(900, true)), true);
  for (const int arch : {750, 800, 860, 890, 900, 1000, 1030, 1200, 1210, 2000}) {
    CHECK_EQUAL(has_wgmma(kernel_set_of(arch, false)), false);
    CHECK_EQUAL(has_bf16(kernel_set_of(arch, false)), arch >= 800);
  }
  for (const KernelSet set : {KernelSet::sm75, KernelSet::sm80}) CHECK_EQUAL(has_wgmma(set), false);
}

// Every tile of every matrix once, in order of matrices; symmetric ones on and below the diagonal alone.
void product_tiles() {
  for (const bool symmetric : {false, true})
    for (const int count : {1, 3})
      for (int rows = 1; rows <= 13; ++rows)
        for (const int columns : {1, 2, 5, rows}) {
          if (symmetric && columns != rows) continue;
          const ProductTiles tiles{count, rows, columns, symmetric};
          std::vector<int> seen(static_cast<std::size_t>(count * rows * columns));
          int matrix = 0;
          for (int number = 0; number < tiles.all(); ++number) {
            const ProductTile tile = tiles.at(number);
            CHECK_EQUAL(tile.matrix >= matrix && tile.matrix < count, true);
            CHECK_EQUAL(tile.row >= 0 && tile.row < rows && tile.column >= 0 && tile.column < columns, true);
            matrix = tile.matrix;
            ++seen[static_cast<std::size_t>((tile.matrix * rows + tile.row) * columns + tile.column)];
          }
          for (int place = 0; place < count * rows * columns; ++place) {
            const bool below = place / columns % rows >= place % columns;
            CHECK_EQUAL(seen[static_cast<std::size_t>(place)], symmetric && !below ? 0 : 1);
          }
        }
}

// Every tile of every product once; what a product waits for is all of its matrix that comes before, and has smaller
// numbers.
void iteration_tiles() {
  IterationTiles tiles;
  const std::array<std::array<int, 3>, 4> groups{
      {{3, 4, 12}, {2, 4, 4}, {5, 2, 4}, {1, 1, 1}}};  // count, rows, columns
  for (const auto& [count, rows, columns] : groups) tiles.add(count, rows, columns);
  CHECK_EQUAL(tiles.of_step(), 2 * (3 * 10 + 2 * 10 + 5 * 3 + 1) + 3 * 48 + 2 * 16 + 5 * 8 + 1);
  std::map<std::pair<int, int>, int> done, finished;  // of each matrix: numbers so far, those of stages before the last
  std::map<std::pair<int, int>, std::pair<int, Stage>> last;
  constexpr int kSteps = 3;
  for (int number = 0; number < kSteps * tiles.of_step(); ++number) {
    const IterationTile tile = tiles.at(number);
    const auto& group = groups[static_cast<std::size_t>(tile.group)];
    const bool square = tile.stage != Stage::quintic;
    CHECK_EQUAL(tile.at.matrix >= 0 && tile.at.matrix < group[0], true);
    CHECK_EQUAL(tile.at.row >= 0 && tile.at.row < group[1], true);
    CHECK_EQUAL(tile.at.column >= 0 && tile.at.column < (square ? tile.at.row + 1 : group[2]), true);
    const std::pair matrix{tile.group, tile.at.matrix};
    const std::pair stage{tile.step, tile.stage};
    const auto before = last.find(matrix);
    if (before == last.end() || before->second != stage) {
      if (before != last.end()) CHECK_EQUAL(before->second < stage, true);
      last[matrix] = stage;
      finished[matrix] = done[matrix];
    }
    CHECK_EQUAL(tile.before, finished[matrix]);
    ++done[matrix];
  }
  for (const auto& [matrix, count] : done) {
    const auto& group = groups[static_cast<std::size_t>(matrix.first)];
    CHECK_EQUAL(count, kSteps * (group[1] * (group[1] + 1) + group[1] * group[2]));
  }
  CHECK_EQUAL(done.size(), std::size_t{3 + 2 + 5 + 1});
}

// Each matrix is gathered once, in order, and normalised once, later, at most two gatherings later.
void preparation_steps() {
  for (int count = 1; count <= 70; ++count) {
    int gathered = 0, normalized = 0;
    for (int number = 0; number < 2 * count; ++number) {
      const PreparationStep step = preparation_step(number, count);
      CHECK_EQUAL(step.matrix, step.normalizes ? normalized++ : gathered++);
      CHECK_EQUAL(normalized <= gathered && gathered - normalized <= 3, true);
    }
    CHECK_EQUAL(gathered, count);
    CHECK_EQUAL(normalized, count);
  }
}

// The instruction as the PTX ISA has it: of each matrix, lane l gets rows 2·(l%4) and 2·(l%4) + 1 of column l/4.
void transposed_read() {
  std::array<std::array<int, 128>, 16> seen{};
  for (int pass = 0; pass < TransposedRead::kPasses; ++pass)
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int i = 0; i < 2; ++i) {
          const auto from = TransposedRead::source(pass, matrix, lane % 4 * 2 + i);
          CHECK_EQUAL(from.row, TransposedRead::half(lane) * 8 + 2 * matrix + i);
          CHECK_EQUAL(from.chunk * 8 + lane / 4, TransposedRead::column(pass, lane));
          ++seen[static_cast<std::size_t>(from.row)][static_cast<std::size_t>(from.chunk * 8 + lane / 4)];
        }
  for (const auto& row : seen)
    for (const int times : row) CHECK_EQUAL(times, 1);
}

}  // namespace

void test_cuda() {
  kernel_sets();
  product_tiles();
  iteration_tiles();
  preparation_steps();
  transposed_read();
}

}  // namespace pgolf::test
