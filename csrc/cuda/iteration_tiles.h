// The tile scheduler of Muon's kernels on many matrices: plain arithmetic, tested without a GPU.
#pragma once

namespace pgolf::cuda {

// One tile of one GEMM's result; row and column count tiles.
struct ProductTile {
  int matrix, row, column;
};

// The tiles of `count` results, of rows × columns tiles each. Of symmetric ones, which have as many columns as rows,
// only the tiles on and below the diagonal have numbers: row by row (0,0), (1,0), (1,1), (2,0), …
struct ProductTiles {
  int count, rows, columns;
  bool symmetric;

  constexpr int of_matrix() const { return symmetric ? rows * (rows + 1) / 2 : rows * columns; }
  constexpr int all() const { return count * of_matrix(); }
  constexpr ProductTile at(int number) const {
    ProductTile tile{number / of_matrix(), 0, number % of_matrix()};
    if (symmetric) {
      while (tile.column > tile.row) tile.column -= ++tile.row;
    } else {
      tile.row = tile.column / columns;
      tile.column %= columns;
    }
    return tile;
  }
};

// The three GEMMs of an iteration, each of which needs the whole result of the one before it, of the same matrix.
enum class Stage { gram, quartic, quintic };

struct IterationTile {
  int step;
  Stage stage;
  int group;
  ProductTile at;
  int before;  // tiles of this matrix in all GEMMs before this one
};

// Groups of matrices X [rows, columns], counted in tiles. Numbers go through step by step, stage by stage, group by
// group, matrix by matrix: what a tile needs has smaller numbers.
struct IterationTiles {
  static constexpr int kGroups = 6;
  ProductTiles symmetric[kGroups], general[kGroups];
  int groups = 0, symmetric_tiles = 0, general_tiles = 0;

  constexpr void add(int count, int rows, int columns) {
    symmetric[groups] = {count, rows, rows, true};
    general[groups] = {count, rows, columns, false};
    symmetric_tiles += symmetric[groups].all();
    general_tiles += general[groups].all();
    ++groups;
  }
  constexpr int of_step() const { return 2 * symmetric_tiles + general_tiles; }
  constexpr IterationTile at(int number) const {
    IterationTile tile{number / of_step(), Stage::gram, 0, {}, 0};
    int rest = number % of_step();
    if (rest >= 2 * symmetric_tiles) {
      tile.stage = Stage::quintic;
      rest -= 2 * symmetric_tiles;
    } else if (rest >= symmetric_tiles) {
      tile.stage = Stage::quartic;
      rest -= symmetric_tiles;
    }
    const ProductTiles* const products = tile.stage == Stage::quintic ? general : symmetric;
    while (rest >= products[tile.group].all()) rest -= products[tile.group++].all();
    tile.at = products[tile.group].at(rest);
    const int of_square = symmetric[tile.group].of_matrix();
    tile.before =
        tile.step * (2 * of_square + general[tile.group].of_matrix()) + static_cast<int>(tile.stage) * of_square;
    return tile;
  }
};

// What is done with `count` matrices before the iterations, numbered 0 … 2·count − 1: each is gathered, and normalised
// two gatherings later, when its sum is there and it is still in L2.
struct PreparationStep {
  int matrix;
  bool normalizes;
};
constexpr PreparationStep preparation_step(int number, int count) {
  const int ahead = count < 2 ? count : 2;
  if (number < ahead) return {number, false};
  if (number >= 2 * count - ahead) return {number - count, true};
  return (number - ahead) % 2 == 0 ? PreparationStep{ahead + (number - ahead) / 2, false}
                                   : PreparationStep{(number - ahead) / 2, true};
}

// How a warp reads a 16-row tile of 16-bit numbers by ldmatrix .trans so that each lane gets eight numbers of one
// column, from row 8·half on. One instruction reads four 8×8 matrices whose rows may lie anywhere: row `row` of matrix
// `matrix` is a chunk of eight columns of one row of the tile. Lane l then holds, of its column, rows 2·matrix and
// 2·matrix + 1 of the half in its register `matrix`. `pass` counts the instructions that read 128 columns: 0 … 7.
struct TransposedRead {
  struct Chunk {
    int row, chunk;
  };
  static constexpr int kPasses = 8;
  static constexpr int first_chunk(int pass) { return pass / 4 * 8 + pass % 4; }
  static constexpr Chunk source(int pass, int matrix, int row) {
    return {row / 2 % 2 * 8 + 2 * matrix + row % 2, first_chunk(pass) + row / 4 * 4};
  }
  static constexpr int half(int lane) { return lane % 2; }
  static constexpr int column(int pass, int lane) { return (first_chunk(pass) + lane % 4 / 2 * 4) * 8 + lane / 4; }
};

}  // namespace pgolf::cuda
