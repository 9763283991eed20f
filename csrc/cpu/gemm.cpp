// The products' kernels. A right-hand side is read in panels of kTileVectors registers' columns, packed or as it
// stands; a left-hand side row by row where it stands, or packed as its tiles read it.
#include "cpu/gemm.h"

#include <utility>

#include "cpu/product.h"
#include "cpu/simd.h"

PGOLF_CPU_BEGIN
namespace {

// k between a load and a store of C. A panel of 64 KiB is read from L2 once for every tile of rows, which is fast
// enough; at half the depth C is read and written twice as often, which is not.
inline constexpr i64 kDepth = kSumBlock;

template <class T>
inline constexpr i64 kWidth = kTileVectors * Vec<T>::kLanes;

// Numbers from one k to the next of a packed tile of rows: whole registers, which are stored in half the time of
// others.
template <class T>
inline constexpr i64 kStep = (kTileRows + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;

template <class T>
PGOLF_INLINE T least(T a, T b) {
  return a < b ? a : b;
}

enum class Finish { store, onward, add };  // 0 + chain; C + chain; C + alpha·(0 + chain)

// C[kRows, columns] of `depth` steps of k. Step l of row i is a[l·kStep + i] where A is packed, else a[i·a_step + l];
// columns of step l begin at b[l·b_step]; only `columns` of them are stored.
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
  const T* ahead = nullptr;  // of a packed panel: what is fetched into L2 on the way
};

// Of the next panel a packed tile fetches so much at every k: ten tiles fetch all of it, and never so fast that what
// the tile itself reads has to wait.
template <class T>
inline constexpr i64 kAhead = kWidth<T> / 8;

template <class T, bool kPacked, int kVectors, int kRows>
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

  const T *a = t.a, *b = t.b, *ahead = t.ahead;
  const i64 a_step = t.a_step, b_step = t.b_step;
#pragma GCC unroll 2
  for (i64 l = 0; l < t.depth; ++l) {
    if constexpr (kPacked) {
      prefetch(ahead);
      ahead += kAhead<T>;
    }
    typename V::Register row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = V::load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename V::Register x = V::repeat(kPacked ? a + i : a + i * a_step);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = V::multiply_add(x, row[v], sum[i][v]);
    }
    a += kPacked ? kStep<T> : 1;
    b += b_step;
  }

  if (t.finish == Finish::add) {
    const typename V::Register alpha = V::repeat(&t.alpha);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = V::multiply_add(alpha, sum[i][v], read(i, v));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* p = t.c + i * t.ldc + v * kLanes;
      if (v == kVectors - 1)
        V::store_first(p, sum[i][v], last);
      else
        V::store(p, sum[i][v]);
    }
}

template <class T>
using TileFunction = void (*)(const Tile<T>&);

template <class T, bool kPacked, int kVectors, int... kBefore>
TileFunction<T> tile_of(i64 rows, std::integer_sequence<int, kBefore...>) {
  static constexpr TileFunction<T> functions[] = {tile<T, kPacked, kVectors, kBefore + 1>...};
  return functions[rows - 1];
}
template <class T, bool kPacked, int kVectors>
TileFunction<T> tile_of(i64 rows) {
  return tile_of<T, kPacked, kVectors>(rows, std::make_integer_sequence<int, kTileRows>());
}
template <class T>
TileFunction<T> tile_of(bool packed, i64 rows, i64 columns) {
  if (kTileVectors == 1 || columns <= Vec<T>::kLanes)
    return packed ? tile_of<T, true, 1>(rows) : tile_of<T, false, 1>(rows);
  return packed ? tile_of<T, true, kTileVectors>(rows) : tile_of<T, false, kTileVectors>(rows);
}

// The tiles that m rows are cut into: as few as there must be, the first `taller` of them by a row.
struct Heights {
  i64 tiles, least_rows, taller;
  explicit Heights(i64 m) : tiles((m + kTileRows - 1) / kTileRows), least_rows(m / tiles), taller(m % tiles) {}
  PGOLF_INLINE i64 next() {
    --tiles;
    return least_rows + (taller-- > 0);
  }
};

// Rows of a left-hand side where they stand, ld apart, or as pack_left leaves them.
template <class T>
struct Left {
  const T* numbers;
  i64 ld;
  bool packed;
};

// All rows [0, m) of a panel of columns. t is the first tile, but for its a; ahead, where it is given, the packed panel
// that comes next.
template <class T>
void tiles(const Left<T>& a, i64 m, Tile<T> t, const T* ahead = nullptr) {
  t.a = a.numbers;
  t.a_step = a.ld;
  const i64 panel = kWidth<T> * t.depth;
  i64 fetched = 0;
  for (Heights heights(m); heights.tiles > 0; fetched += kAhead<T> * t.depth) {
    const i64 rows = heights.next();
    t.ahead = ahead && fetched < panel ? ahead + fetched : t.b;
    tile_of<T>(a.packed, rows, t.columns)(t);
    t.a += a.packed ? kStep<T> * t.depth : rows * t.a_step;
    t.c += rows * t.ldc;
  }
}

// out[l·step + i] = a[i·lda + l], l < depth, i < rows ≤ kLanes. Whole registers are stored: lanes past the rows hold
// anything.
template <class T>
void transpose_rows(i64 rows, i64 depth, const T* a, i64 lda, T* out, i64 step) {
  constexpr i64 kLanes = Vec<T>::kLanes;
  const T* from[kLanes];
  for (i64 i = 0; i < kLanes; ++i) from[i] = a + least(i, rows - 1) * lda;
  i64 l = 0;
  for (; l + kLanes <= depth; l += kLanes, out += kLanes * step) {
    Vec<T>::transpose(from, out, step);
    for (const T*& row : from) row += kLanes;
  }
  for (; l < depth; ++l, out += step)
    for (i64 i = 0; i < rows; ++i) out[i] = *from[i]++;
}

template <class T>
PGOLF_INLINE typename Vec<T>::Register load_at_most(const T* p, i64 count) {
  return count >= Vec<T>::kLanes ? Vec<T>::load(p) : Vec<T>::load_first(p, static_cast<int>(count));
}

// out[l·kWidth + j] = op(B)[l, j], l < depth, j < columns. Lanes past the columns hold anything: nothing of theirs is
// stored.
template <class T>
void pack(Transpose tb, i64 depth, i64 columns, const T* b, i64 ldb, T* out) {
  constexpr i64 kLanes = Vec<T>::kLanes;
  if (tb) {
    for (i64 j = 0; j < columns; j += kLanes)
      transpose_rows(least(columns - j, kLanes), depth, b + j * ldb, ldb, out + j, kWidth<T>);
    return;
  }
  for (i64 l = 0; l < depth; ++l, b += ldb, out += kWidth<T>)
    for (i64 j = 0; j < columns; j += kLanes) Vec<T>::store(out + j, load_at_most(b + j, columns - j));
}

// Rows of A that are packed together: 256 KiB, and a quarter more for their step, which stay in L2 while all panels
// meet them.
template <class T>
inline constexpr i64 kPackedRows = 128 * 4 / static_cast<i64>(sizeof(T));
template <class T>
inline constexpr i64 kPackedSize = (kPackedRows<T> + kTileRows - 1) / kTileRows * kStep<T> * kDepth;

// Rows [0, m) of op(A), `depth` of k: tile by tile, in each k by k.
template <class T>
void pack_left(Transpose ta, i64 m, i64 depth, const T* a, i64 lda, T* out) {
  constexpr i64 kLanes = Vec<T>::kLanes;
  if (ta == kPlain) {
    for (Heights heights(m); heights.tiles > 0; out += kStep<T> * depth) {
      const i64 rows = heights.next();
      for (i64 i = 0; i < rows; i += kLanes)
        transpose_rows(least(rows - i, kLanes), depth, a + i * lda, lda, out + i, kStep<T>);
      a += rows * lda;
    }
    return;
  }
  // In the order in which A stands: a walk through its pages for every tile would cost more.
  struct {
    i64 first;
    T* to;
  } parts[kPackedSize<T> / kDepth / kLanes];
  int count = 0;
  i64 first = 0;
  for (Heights heights(m); heights.tiles > 0; out += kStep<T> * depth) {
    const i64 rows = heights.next();
    for (i64 i = 0; i < rows; i += kLanes) parts[count++] = {first + i, out + i};
    first += rows;
  }
  int whole = count;  // parts whose registers end within A's rows
  while (whole > 0 && parts[whole - 1].first + kLanes > m) --whole;
  for (i64 l = 0; l < depth; ++l, a += lda) {
    for (int i = 0; i < whole; ++i) Vec<T>::store(parts[i].to + l * kStep<T>, Vec<T>::load(a + parts[i].first));
    for (int i = whole; i < count; ++i)
      Vec<T>::store(parts[i].to + l * kStep<T>,
                    Vec<T>::load_first(a + parts[i].first, static_cast<int>(m - parts[i].first)));
  }
}

// A is packed where many panels read it; a transposed one always, as every step of its k is in another page.
template <class T>
PGOLF_INLINE bool packs_left(Transpose ta, i64 m, i64 n) {
  return ta || (m > kTileRows && n >= 8 * kWidth<T>);
}

// Columns of B from j on as tiles read them, a step apart; the packed panel that comes next, or null.
template <class T>
struct Panel {
  const T* numbers;
  i64 step;
  const T* ahead = nullptr;
};

// C = op(A)·op(B) by blocks of A's rows and of k; panel_of(l, depth, j, rows) hands out B's columns from j on for so
// many rows.
template <class T, class PanelOf>
void multiply(Transpose ta, i64 m, i64 n, i64 k, const T* a, i64 lda, bool add, T alpha, Start start, T* c, i64 ldc,
              PanelOf&& panel_of) {
  alignas(64) T packed[kPackedSize<T>];
  const bool packs = packs_left<T>(ta, m, n);
  for (i64 first = 0; first < m; first += kPackedRows<T>) {
    const i64 rows = least(m - first, kPackedRows<T>);
    for (i64 l = 0; l < k || l == 0; l += kDepth) {  // a product of depth 0 is 0
      const i64 depth = least(k - l, kDepth);
      const T* from = a + (ta ? l * lda + first : first * lda + l);
      if (packs) pack_left(ta, rows, depth, from, lda, packed);
      const Left<T> left = packs ? Left<T>{packed, 0, true} : Left<T>{from, lda, false};
      const Finish finish = add ? Finish::add : l > 0 || start == kFromC ? Finish::onward : Finish::store;
      for (i64 j = 0; j < n; j += kWidth<T>) {
        const Panel<T> panel = panel_of(l, depth, j, rows);
        tiles<T>(left, rows,
                 {depth, nullptr, 0, panel.numbers, panel.step, finish, alpha, c + first * ldc + j, ldc,
                  least(n - j, kWidth<T>)},
                 panel.ahead);
      }
    }
  }
}

// Every panel is packed just before it is multiplied, unless it can be read where it stands by few rows.
template <class T>
void multiply_plain(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, bool add,
                    T alpha, Start start, T* c, i64 ldc) {
  constexpr i64 kDirectRows = 64;
  alignas(64) T panel[kDepth * kWidth<T>];
  multiply<T>(ta, m, n, k, a, lda, add, alpha, start, c, ldc, [&](i64 l, i64 depth, i64 j, i64 rows) -> Panel<T> {
    const T* from = tb ? b + j * ldb + l : b + l * ldb + j;
    const i64 columns = least(n - j, kWidth<T>);
    if (tb == kPlain && columns == kWidth<T> && rows <= kDirectRows) return {from, ldb};
    pack(tb, depth, columns, from, ldb, panel);
    return {panel, kWidth<T>};
  });
}

template <class T>
void multiply_packed(Transpose ta, i64 m, i64 n, i64 k, const T* a, i64 lda, const T* packed, bool add, T alpha,
                     Start start, T* c, i64 ldc) {
  multiply<T>(ta, m, n, k, a, lda, add, alpha, start, c, ldc, [&](i64 l, i64, i64 j, i64) -> Panel<T> {
    const T* panel = packed + j * k + l * kWidth<T>;
    return {panel, kWidth<T>, j + kWidth<T> < n ? panel + kWidth<T> * k : nullptr};
  });
}

}  // namespace

template <class T>
void gemm(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, const T* a, i64 lda, const T* b, i64 ldb, Start start, T* c,
          i64 ldc) {
  multiply_plain<T>(ta, tb, m, n, k, a, lda, b, ldb, false, T(1), start, c, ldc);
}

template <class T>
void gemm_blocks(Transpose ta, Transpose tb, i64 m, i64 n, i64 k, T alpha, const T* a, i64 lda, const T* b, i64 ldb,
                 T* c, i64 ldc) {
  multiply_plain<T>(ta, tb, m, n, k, a, lda, b, ldb, true, alpha, kFromZero, c, ldc);
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
          {a + j * lda + l, lda, false}, n - j,
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
  multiply_packed<T>(kPlain, m, n, k, a, lda, packed, false, T(1), start, c, ldc);
}

template <class T>
void gemm_packed_block(i64 m, i64 n, i64 k, T alpha, const T* a, i64 lda, const T* packed, T* c, i64 ldc) {
  multiply_packed<T>(kTransposed, m, n, k, a, lda, packed, true, alpha, kFromZero, c, ldc);
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
  if (p.kind == CpuProduct::kPackedBlocks) {
    for (i64 l = 0; l < p.k; l += kSumBlock) {
      const i64 depth = least(p.k - l, kSumBlock);
      for (i64 i = 0; i < panels_of<T>(p.n); ++i)
        pack_panel<T>(tb, p.n, depth, b + (tb ? l : l * p.ldb), p.ldb, i, packed);
      gemm_packed_block<T>(p.m, p.n, depth, T(p.alpha), a + l * p.lda, p.lda, packed, c, p.ldc);
    }
    return;
  }
  for (i64 i = 0; i < panels_of<T>(p.n); ++i) pack_panel<T>(tb, p.n, p.k, b, p.ldb, i, packed);
  gemm_packed<T>(p.m, p.n, p.k, a, p.lda, packed, start, c, p.ldc);
}

}  // namespace

void run_product(const CpuProduct& p) { p.dtype == DType::f64 ? product_of<double>(p) : product_of<float>(p); }

double run_multiply_adds(i64 steps) {
  using V = Vec<float>;
  constexpr int kSums = kTileRows * kTileVectors;
  float factors[2] = {0.999f, 0.001f}, lanes[V::kLanes];
  const V::Register x = V::repeat(factors), y = V::repeat(factors + 1);
  V::Register sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = V::zero();
  for (i64 step = 0; step < steps; ++step)
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = V::multiply_add(sum[i], x, y);
  bool used = true;  // what nobody reads would not be computed
  for (int i = 0; i < kSums; ++i) {
    V::store(lanes, sum[i]);
    used = used && lanes[0] >= 0;
  }
  return used ? 2.0 * kSums * V::kLanes * double(steps) : 0;
}

#define PGOLF_INSTANTIATE(T)                                                                                   \
  template void gemm<T>(Transpose, Transpose, i64, i64, i64, const T*, i64, const T*, i64, Start, T*, i64);    \
  template void gemm_blocks<T>(Transpose, Transpose, i64, i64, i64, T, const T*, i64, const T*, i64, T*, i64); \
  template void gemm_symmetric<T>(i64, i64, const T*, i64, T*);                                                \
  template i64 panel_width<T>();                                                                               \
  template void pack_panel<T>(Transpose, i64, i64, const T*, i64, i64, T*);                                    \
  template void gemm_packed<T>(i64, i64, i64, const T*, i64, const T*, Start, T*, i64);                        \
  template void gemm_packed_block<T>(i64, i64, i64, T, const T*, i64, const T*, T*, i64);
PGOLF_INSTANTIATE(float)
PGOLF_INSTANTIATE(double)

PGOLF_CPU_END
