// The products' kernels. A right-hand side is read in panels of kTileVectors registers' columns, packed or as it
// stands; a left-hand side as it stands, or packed where it lies transposed.
#include "cpu/gemm.h"

#include <utility>

#include "cpu/product.h"
#include "cpu/simd.h"

PGOLF_CPU_BEGIN
namespace {

inline constexpr i64 kDepth = 256;  // of k between a load and a store of C: a panel is 32 KiB and stays in L1

template <class T>
inline constexpr i64 kWidth = kTileVectors * Vec<T>::kLanes;

template <class T>
PGOLF_INLINE T least(T a, T b) {
  return a < b ? a : b;
}

enum class Finish { store, onward, add };  // 0 + chain; C + chain; C + alpha·(0 + chain)

// C[kRows, columns] of `depth` steps of k. Step l of row i is a[l·a_step + i] where a tile's rows are adjacent, else
// a[i·a_step + l]; columns of step l begin at b[l·b_step]; only `columns` of them are stored.
template <class T>
struct Tile {
  i64 depth;
  const T* a;
  i64 a_step;
  const T* b;
  i64 b_step;
  Finish finish;
  T alpha;
  T* c;
  i64 ldc;
  i64 columns;
};

template <class T, bool kRowsAdjacent, int kVectors, int kRows>
void tile(const Tile<T>& t) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  typename V::Register sum[kRows][kVectors];
  const int last = static_cast<int>(t.columns) - (kVectors - 1) * kLanes;  // columns of the last register
  const auto read = [&](int i, int v) {
    const T* p = t.c + i * t.ldc + v * kLanes;
    return v == kVectors - 1 ? V::load_first(p, last) : V::load(p);
  };
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = t.finish == Finish::onward ? read(i, v) : V::zero();

  const T *a = t.a, *b = t.b;
  const i64 a_step = t.a_step, b_step = t.b_step;
  for (i64 l = 0; l < t.depth; ++l) {
    typename V::Register row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = V::load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename V::Register x = V::repeat(kRowsAdjacent ? a + i : a + i * a_step);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = V::multiply_add(x, row[v], sum[i][v]);
    }
    a += kRowsAdjacent ? a_step : 1;
    b += b_step;
  }

#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* p = t.c + i * t.ldc + v * kLanes;
      typename V::Register x = sum[i][v];
      if (t.finish == Finish::add) x = V::multiply_add(V::repeat(&t.alpha), x, read(i, v));
      if (v == kVectors - 1)
        V::store_first(p, x, last);
      else
        V::store(p, x);
    }
}

template <class T>
using TileFunction = void (*)(const Tile<T>&);

template <class T, bool kRowsAdjacent, int kVectors, int... kBefore>
TileFunction<T> tile_of(i64 rows, std::integer_sequence<int, kBefore...>) {
  static constexpr TileFunction<T> functions[] = {tile<T, kRowsAdjacent, kVectors, kBefore + 1>...};
  return functions[rows - 1];
}
template <class T, bool kRowsAdjacent, int kVectors>
TileFunction<T> tile_of(i64 rows) {
  return tile_of<T, kRowsAdjacent, kVectors>(rows, std::make_integer_sequence<int, kTileRows>());
}
template <class T>
TileFunction<T> tile_of(bool adjacent, i64 rows, i64 columns) {
  if (kTileVectors == 1 || columns <= Vec<T>::kLanes)
    return adjacent ? tile_of<T, true, 1>(rows) : tile_of<T, false, 1>(rows);
  return adjacent ? tile_of<T, true, kTileVectors>(rows) : tile_of<T, false, kTileVectors>(rows);
}

// A left-hand side where it stands
template <class T>
struct Left {
  const T* numbers;
  i64 ld;
  bool transposed;
  PGOLF_INLINE const T* at(i64 row, i64 l) const { return numbers + (transposed ? l * ld + row : row * ld + l); }
};

// All rows [0, m) of a panel of columns, in tiles of nearly one height: t is the first, but for its a.
template <class T>
void tiles(const Left<T>& a, i64 m, i64 l, Tile<T> t) {
  t.a_step = a.ld;
  i64 left = (m + kTileRows - 1) / kTileRows;
  for (i64 i = 0, rows; left > 0; i += rows, t.c += rows * t.ldc, --left) {
    rows = (m - i + left - 1) / left;
    t.a = a.at(i, l);
    tile_of<T>(a.transposed, rows, t.columns)(t);
  }
}

// out[l·kWidth + j] = op(B)[l, j], l < depth, j < columns. Lanes past the columns hold anything: nothing of theirs is
// stored.
template <class T>
void pack(Transpose tb, i64 depth, i64 columns, const T* b, i64 ldb, T* out) {
  constexpr i64 kLanes = Vec<T>::kLanes;
  if (tb == kPlain) {
    for (i64 l = 0; l < depth; ++l, b += ldb, out += kWidth<T>)
      for (i64 j = 0; j < columns; j += kLanes)
        Vec<T>::store(out + j, columns - j >= kLanes ? Vec<T>::load(b + j)
                                                     : Vec<T>::load_first(b + j, static_cast<int>(columns - j)));
    return;
  }
  for (i64 j = 0; j < columns; j += kLanes) {
    const T* rows[kLanes];
    for (i64 i = 0; i < kLanes; ++i) rows[i] = b + least(j + i, columns - 1) * ldb;
    i64 l = 0;
    for (; l + kLanes <= depth; l += kLanes) {
      Vec<T>::transpose(rows, out + l * kWidth<T> + j, kWidth<T>);
      for (const T*& row : rows) row += kLanes;
    }
    for (; l < depth; ++l)
      for (i64 i = 0; i < kLanes; ++i) out[l * kWidth<T> + j + i] = *rows[i]++;
  }
}

// Rows of a transposed A that are packed together: 256 KiB of the stack, less than the smallest that threads have.
template <class T>
inline constexpr i64 kPackedRows = 128 * 4 / static_cast<i64>(sizeof(T));

// A transposed A as its tiles read it, step by step of k side by side: where it stands, every step is in another page.
// `out` has the tiles of `rows` rows one behind the other, heights as `tiles` cuts them.
template <class T>
void pack_left(const Left<T>& a, i64 rows, i64 first, i64 l, i64 depth, T* out) {
  const T* from = a.at(first, l);
  for (i64 step = 0; step < depth; ++step, from += a.ld) {
    i64 left = (rows + kTileRows - 1) / kTileRows;
    for (i64 i = 0, height; left > 0; i += height, --left) {
      height = (rows - i + left - 1) / left;
      T* to = out + i * depth + step * height;
      for (i64 r = 0; r < height; ++r) to[r] = from[i + r];
    }
  }
}

// All rows of a panel of columns, of what pack_left has packed.
template <class T>
void packed_tiles(const T* packed, i64 rows, Tile<T> t) {
  i64 left = (rows + kTileRows - 1) / kTileRows;
  for (i64 i = 0, height; left > 0; i += height, t.c += height * t.ldc, --left) {
    height = (rows - i + left - 1) / left;
    t.a = packed + i * t.depth;
    t.a_step = height;
    tile_of<T>(true, height, t.columns)(t);
  }
}

// B is read where it stands, if it can be, by few rows; by more, from a packed panel that stays in the first-level
// cache.
inline constexpr i64 kDirectRows = 64;

template <class T, i64 kBlock>
void multiply(const Left<T>& a, Transpose tb, i64 m, i64 n, i64 k, const T* b, i64 ldb, bool add, T alpha, Start start,
              T* c, i64 ldc) {
  alignas(64) T panel[kBlock * kWidth<T>];
  if (a.transposed && m > kTileRows && n > kWidth<T>) {
    alignas(64) T left[kBlock * kPackedRows<T>];
    for (i64 first = 0; first < m; first += kPackedRows<T>) {
      const i64 rows = least(m - first, kPackedRows<T>);
      for (i64 l = 0; l < k || l == 0; l += kBlock) {
        const i64 depth = least(k - l, kBlock);
        pack_left(a, rows, first, l, depth, left);
        const Finish finish = add ? Finish::add : l > 0 || start == kFromC ? Finish::onward : Finish::store;
        for (i64 j = 0; j < n; j += kWidth<T>) {
          const i64 columns = least(n - j, kWidth<T>);
          const T* from = tb ? b + j * ldb + l : b + l * ldb + j;
          const bool direct = tb == kPlain && columns == kWidth<T> && rows <= kDirectRows;
          if (!direct) pack(tb, depth, columns, from, ldb, panel);
          packed_tiles<T>(left, rows,
                          {depth, nullptr, 0, direct ? from : panel, direct ? ldb : kWidth<T>, finish, alpha,
                           c + first * ldc + j, ldc, columns});
        }
      }
    }
    return;
  }
  const auto block = [&](i64 l, i64 depth) {
    for (i64 j = 0; j < n; j += kWidth<T>) {
      const i64 columns = least(n - j, kWidth<T>);
      const T* from = tb ? b + j * ldb + l : b + l * ldb + j;
      const bool direct = tb == kPlain && columns == kWidth<T> && m <= kDirectRows;
      if (!direct) pack(tb, depth, columns, from, ldb, panel);
      const Finish finish = add ? Finish::add : l > 0 || start == kFromC ? Finish::onward : Finish::store;
      tiles<T>(
          a, m, l,
          {depth, nullptr, 0, direct ? from : panel, direct ? ldb : kWidth<T>, finish, alpha, c + j, ldc, columns});
    }
  };
  for (i64 l = 0; l < k || l == 0; l += kBlock) block(l, least(k - l, kBlock));  // a product of depth 0 is 0
}

}  // namespace

template <class T>
void gemm(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, Start start, T* c,
          i64 ldc) {
  multiply<T, kDepth>({a, lda, ta}, tb, m, n, k, b, ldb, false, T(1), start, c, ldc);
}

template <class T>
void gemm_blocks(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, T alpha, const T* a, i64 lda, const T* b, i64 ldb,
                 T* c, i64 ldc) {
  multiply<T, kSumBlock>({a, lda, ta}, tb, m, n, k, b, ldb, true, alpha, kFromZero, c, ldc);
}

template <class T>
void gemm_symmetric(i64 n, i64 k, const T* a, i64 lda, T* c) {
  alignas(64) T panel[kDepth * kWidth<T>];
  for (i64 l = 0; l < k || l == 0; l += kDepth) {
    const i64 depth = least(k - l, kDepth);
    for (i64 j = 0; j < n; j += kWidth<T>) {  // the panel's rows from the diagonal on
      const i64 columns = least(n - j, kWidth<T>);
      pack(kTransposed, depth, columns, a + j * lda + l, lda, panel);
      tiles<T>(
          {a + j * lda, lda, false}, n - j, l,
          {depth, nullptr, 0, panel, kWidth<T>, l ? Finish::onward : Finish::store, T(1), c + j * n + j, n, columns});
    }
  }
  // Mirror square by square: whole ones below the diagonal in registers, the others number by number.
  constexpr i64 kSide = Vec<T>::kLanes;
  for (i64 r0 = 0; r0 < n; r0 += kSide)
    for (i64 c0 = 0; c0 <= r0; c0 += kSide) {
      if (c0 < r0 && r0 + kSide <= n) {
        const T* rows[kSide];
        for (i64 r = 0; r < kSide; ++r) rows[r] = c + (r0 + r) * n + c0;
        Vec<T>::transpose(rows, c + c0 * n + r0, n);
        continue;
      }
      for (i64 r = r0; r < least(n, r0 + kSide); ++r)
        for (i64 j = c0; j < least(r, c0 + kSide); ++j) c[j * n + r] = c[r * n + j];
    }
}

template <class T>
i64 panel_width() {
  return kWidth<T>;
}

template <class T>
void pack_panel(Transpose tb, i64 n, i64 k, const T* b, i64 ldb, i64 index, T* packed) {
  const i64 j = index * kWidth<T>;
  pack(tb, k, least(n - j, kWidth<T>), b + (tb ? j * ldb : j), ldb, packed + j * k);
}

template <class T>
void gemm_packed(i64 m, i64 n, i64 k, const T* a, i64 lda, const T* packed, Start start, T* c, i64 ldc) {
  // Rows that all panels meet before the next ones do: theirs of A and C stay in the second-level cache.
  constexpr i64 kRows = 128;
  for (i64 first = 0; first < m; first += kRows, a += kRows * lda, c += kRows * ldc)
    for (i64 l = 0; l < k || l == 0; l += kDepth) {
      const Finish finish = l > 0 || start == kFromC ? Finish::onward : Finish::store;
      for (i64 j = 0; j < n; j += kWidth<T>)
        tiles<T>({a, lda, false}, least(m - first, kRows), l,
                 {least(k - l, kDepth), nullptr, 0, packed + j * k + l * kWidth<T>, kWidth<T>, finish, T(1), c + j, ldc,
                  least(n - j, kWidth<T>)});
    }
}

namespace {

template <class T>
void product_of(const CpuProduct& p) {
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  T* c = static_cast<T*>(p.c);
  const Transpose ta = p.transpose_a ? kTransposed : kPlain, tb = p.transpose_b ? kTransposed : kPlain;
  const Start start = p.from_c ? kFromC : kFromZero;
  if (p.kind == CpuProduct::kChain) return gemm<T>(ta, tb, p.m, p.n, p.k, a, p.lda, b, p.ldb, start, c, p.ldc);
  if (p.kind == CpuProduct::kBlocks)
    return gemm_blocks<T>(ta, tb, p.m, p.n, p.k, T(p.alpha), a, p.lda, b, p.ldb, c, p.ldc);
  if (p.kind == CpuProduct::kSymmetric) return gemm_symmetric<T>(p.n, p.k, a, p.lda, c);
  T* packed = static_cast<T*>(p.packed);
  for (i64 i = 0; i < panels_of<T>(p.n); ++i) pack_panel<T>(tb, p.n, p.k, b, p.ldb, i, packed);
  gemm_packed<T>(p.m, p.n, p.k, a, p.lda, packed, start, c, p.ldc);
}

}  // namespace

void run_product(const CpuProduct& p) { p.dtype == DType::f64 ? product_of<double>(p) : product_of<float>(p); }

#define PGOLF_INSTANTIATE(T)                                                                                   \
  template void gemm<T>(Transpose, Transpose, i64, i64, i64, const T*, i64, const T*, i64, Start, T*, i64);    \
  template void gemm_blocks<T>(Transpose, Transpose, i64, i64, i64, T, const T*, i64, const T*, i64, T*, i64); \
  template void gemm_symmetric<T>(i64, i64, const T*, i64, T*);                                                \
  template i64 panel_width<T>();                                                                               \
  template void pack_panel<T>(Transpose, i64, i64, const T*, i64, i64, T*);                                    \
  template void gemm_packed<T>(i64, i64, i64, const T*, i64, const T*, Start, T*, i64);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)

PGOLF_CPU_END
