// Part of rpe_attention_kernels.h: maps of any ids. Those of a grid are read where they lie, by windows; free ones, and
// those of a tile's queries, are made small first.

// ---- ids in scratch

// to[j] = id of (i, j)
template <class Id>
void free_row(Id* to, const Map& map, int64_t i, int64_t columns) {
  const auto copy = [&](const auto* ids) {
    ids += i * map.row;
    if (map.column == 1) {
      for (int64_t j = 0; j < columns; ++j) to[j] = Id(int64_t(ids[j]) - map.lowest);
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = Id(int64_t(ids[j * map.column]) - map.lowest);
    }
  };
  switch (map.bytes) {
    case 1: return copy(static_cast<const uint8_t*>(map.ids));
    case 2: return copy(static_cast<const int16_t*>(map.ids));
    case 4: return copy(static_cast<const int32_t*>(map.ids));
    default: copy(static_cast<const int64_t*>(map.ids));
  }
}

// to[j, m] = id of (key j, query at place first + m) for 16 queries; 0 where there is none. Writes 15 ids behind the last.
template <class Id>
void ids_of_block(Id* to, const Problem& p, const Map& map, int64_t first) {
  const int64_t count = least(p.Lq - first, 16), h = map.height, w = map.width;
  clear(to, p.Lk * 16 + 15);
  if (map.kind == Map::free) {
    const bool neighbours = count == 16 && map.column == 1 && p.height == 0;
    int64_t column[16];
    for (int64_t m = 0; m < count; ++m) column[m] = p.query_at(first + m) * map.column;
    const auto copy = [&](const auto* ids) {
      for (int64_t j = 0; j < p.Lk; ++j, ids += map.row) {
        if (neighbours) {
          for (int64_t m = 0; m < 16; ++m) to[j * 16 + m] = Id(int64_t(ids[first + m]) - map.lowest);
        } else {
          for (int64_t m = 0; m < count; ++m) to[j * 16 + m] = Id(int64_t(ids[column[m]]) - map.lowest);
        }
      }
    };
    switch (map.bytes) {
      case 1: copy(static_cast<const uint8_t*>(map.ids)); break;
      case 2: copy(static_cast<const int16_t*>(map.ids)); break;
      case 4: copy(static_cast<const int32_t*>(map.ids)); break;
      default: copy(static_cast<const int64_t*>(map.ids));
    }
    return;
  }
  const Id* offsets = static_cast<const Id*>(map.of_offset);
  if (map.odd) {
    for (int64_t m = 0; m < count; ++m) {
      const int64_t i = p.query_at(first + m) - map.skip;
      for (int64_t j = 0; j < p.Lk; ++j) {
        const int64_t t = j - map.skip;
        const int64_t at = (w - 1 - t % w + i % w) * map.stride + (h - 1 - t / w + i / w);
        to[j * 16 + m] = i < 0 || t < 0 ? Id(map.skip_id) : offsets[at];
      }
    }
    return;
  }
  const Segments segments(Tile<Id>{to, 16, first, count, p.Lk}, map);
  for (int64_t j = 0; j < map.skip; ++j) {
    for (int64_t m = 0; m < count; ++m) to[j * 16 + m] = Id(map.skip_id);
  }
  for (int64_t row = 0, j = map.skip; row < h; ++row) {
    for (int64_t column = 0; column < w; ++column, ++j) {
      for (const Segment& s : segments) {  // what is too long is overwritten by the next one
        Id* at = to + j * 16 + s.at;
        if (s.column < 0) {
          for (int64_t m = 0; m < s.count; ++m) at[m] = Id(map.skip_id);
        } else {
          const Id* from = offsets + (w - 1 - column + s.column) * map.stride + (h - 1 - row + s.row);
          __builtin_memcpy(at, from, 16 * sizeof(Id));
        }
      }
    }
  }
}

// ---- look up

#ifdef RPE_AVX512
template <int R>
struct Registers {
  __m512 part[R];
  RPE_INLINE explicit Registers(const float* table) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) part[r] = _mm512_loadu_ps(table + 16 * r);
  }
  RPE_INLINE __m512 operator()(const uint8_t* ids) const {
    const __m512i id = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(ids)));
    if constexpr (R == 1) {
      return _mm512_permutexvar_ps(id, part[0]);
    } else if constexpr (R == 2) {
      return _mm512_permutex2var_ps(part[0], id, part[1]);
    } else {
      const __m512 low = _mm512_permutex2var_ps(part[0], id, part[1]);
      const __m512 high = _mm512_permutex2var_ps(part[2], id, part[3]);
      return _mm512_mask_blend_ps(_mm512_test_epi32_mask(id, _mm512_set1_epi32(32)), low, high);
    }
  }
};
#endif

// to[c] = table[ids[c]] for `rows` rows of n, ids behind each other by `stride`; writes up to 15 numbers behind the last
template <class T, class Id>
void look_up_rows(T* to, const T* table, const Term& term, const Id* ids, int64_t stride, int64_t rows, int64_t n) {
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4 && sizeof(Id) == 1) {
    const auto in_registers = [&](const auto& find) {
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t c = 0; c < n; c += 16) _mm512_storeu_ps(to + y * n + c, find(ids + y * stride + c));
      }
    };
    if (term.width <= 16) return in_registers(Registers<1>(table));
    if (term.width <= 32) return in_registers(Registers<2>(table));
    if (term.width <= 64) return in_registers(Registers<4>(table));
  }
#endif
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t c = 0; c < n; ++c) to[y * n + c] = table[ids[y * stride + c]];
  }
}

// to[j] = table[id of (query i, key j)]; writes up to 15 numbers behind the last key. `scratch` holds a row of ids.
template <class T, class Id>
void fill_by_ids(T* to, const T* table, const Term& term, int64_t i, int64_t keys, Id* scratch) {
  const Map& map = term.map;
  if (map.kind == Map::free) {
    free_row(scratch, map, i, keys);
    return look_up_rows(to, table, term, scratch, 0, 1, keys);
  }
  const int64_t alone = i < map.skip ? keys : map.skip;
  for (int64_t j = 0; j < alone; ++j) to[j] = table[map.skip_id];
  if (i < map.skip) return;
  const int64_t row = (i - map.skip) / map.width, column = (i - map.skip) % map.width;
  const Id* ids = static_cast<const Id*>(map.of_offset) + (map.height - 1 - row) * map.stride + (map.width - 1 - column);
  look_up_rows(to + map.skip, table, term, ids, map.stride, map.height, map.width);
}

// S[i, j] += tables[j, ids[j, i]] for the queries of a tile from row `at` on, at most 16, by a block of their ids
template <class T, class Id>
void add_block(const Tile<T>& tile, int64_t at, const T* tables, const Term& term, const Id* ids) {
  const int64_t rows = least(tile.rows - at, 16);
  T* numbers = tile.numbers + at * tile.stride;
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4 && sizeof(Id) == 1) {
    const auto in_registers = [&](auto parts) {
      for (int64_t j = 0; j < tile.keys; j += 16) {
        __m512 r[16];
#pragma GCC unroll 16
        for (int w = 0; w < 16; ++w) {
          const int64_t key = least(j + w, tile.keys - 1);  // what lies beyond the last key is masked later
          r[w] = Registers<decltype(parts)::value>(tables + key * term.width)(ids + key * 16);
        }
        transpose16(r);
#pragma GCC unroll 16
        for (int w = 0; w < 16; ++w) {
          float* to = numbers + w * tile.stride + j;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), r[w]));
        }
      }
    };
    if (term.width <= 16) return in_registers(Count<1>());
    if (term.width <= 32) return in_registers(Count<2>());
    if (term.width <= 64) return in_registers(Count<4>());
  }
#endif
  for (int64_t j = 0; j < tile.keys; j += 8) {
    const int64_t count = least(tile.keys - j, 8);
    for (int64_t i = 0; i < rows; i += 8) {
      oct<T> r[8];
      for (int64_t m = 0; m < 8; ++m) {
        const int64_t key = least(j + m, tile.keys - 1);
        T found[8];
        for (int64_t n = 0; n < 8; ++n) found[n] = tables[key * term.width + ids[key * 16 + i + n]];
        r[m] = load8<T>(found);
      }
      transpose8<T>(r);
      for (int64_t n = 0; n < least(rows - i, 8); ++n) {
        T* to = numbers + (i + n) * tile.stride + j;
        store8(to, load8(to) + (count < 8 ? first_of<T>(r[n], count) : r[n]));
      }
    }
  }
}

// ---- sums

// What the sums of a row are made with: rows of a grid that are alike are added up before they are sorted.
template <class T>
struct Groups {
  const T** totals;       // (h), where the totals of a group begin
  const void** ids;       // (h), and its ids
  T* buffer;              // h w, and 16
};

// sums[n] = sum of row[j] over ids[j] = n; `sums` has room for four copies, so that equal neighbours do not wait
template <class T, class Id>
void sum_by_ids(T* __restrict sums, const T* __restrict row, const Term& term, int64_t i, int64_t keys, Id* scratch,
                const Groups<T>& groups) {
  constexpr int W = simd<T>::W;
  const Map& map = term.map;
  const int64_t width = term.width;
  clear(sums, 4 * width);
  const int64_t alone = map.kind == Map::free ? 0 : i < map.skip ? keys : map.skip;
  for (int64_t j = 0; j < alone; ++j) sums[j % 4 * width + map.skip_id] += row[j];
  if (map.kind == Map::free) {
    free_row(scratch, map, i, keys);
    int64_t j = 0;
    for (; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) sums[w * width + scratch[j + w]] += row[j + w];
    }
    for (; j < keys; ++j) sums[scratch[j]] += row[j];
  } else if (i >= map.skip) {
    const int64_t w = map.width, from = map.height - 1 - (i - map.skip) / w, end = from + map.height;
    const Id* ids = static_cast<const Id*>(map.of_offset) + (w - 1 - (i - map.skip) % w);
    const T* places = row + map.skip - from * w;
    T* buffer = groups.buffer;
    int64_t count = 0;
    for (int64_t y = from; y < end; ++y) {
      if (map.earlier[y] >= from) continue;  // added up with an earlier one
      groups.totals[count] = places + y * w;
      if (map.later[y] < end) {
        for (int64_t n = 0; n < w; n += 8) {
          oct<T> total = load8(places + y * w + n);
          for (int64_t z = map.later[y]; z < end; z = map.later[z]) total += load8(places + z * w + n);
          store8(buffer + n, total);
        }
        groups.totals[count] = buffer;
        buffer += w;
      }
      groups.ids[count++] = ids + y * map.stride;
    }
    // across the groups, which seldom share a bucket, before the next column, which often does
    for (int64_t c = 0; c < w; ++c) {
      T* __restrict copy = sums + c % 4 * width;
      for (int64_t g = 0; g < count; ++g) copy[static_cast<const Id*>(groups.ids[g])[c]] += groups.totals[g][c];
    }
  }
  for (int64_t c = 0; c < width; c += W) {
    const T* at = sums + c;
    store(sums + c, (load(at) + load(at + width)) + (load(at + 2 * width) + load(at + 3 * width)));
  }
}

// sums[j, n] += sum of S[i, j] with ids[j, i] = n over the queries of a tile from row `at` on, at most 16
template <class T, class Id>
void sum_block(T* sums, const Tile<T>& tile, int64_t at, const Term& term, const Id* ids) {
  const int64_t width = term.width, rows = least(tile.rows - at, 16);
  const T* numbers = tile.numbers + at * tile.stride;
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4) {
    for (int64_t j = 0; j < tile.keys; j += 16) {
      __m512 r[16];
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) r[w] = _mm512_loadu_ps(numbers + w * tile.stride + j);
      transpose16(r);
      alignas(64) float block[16][16];
#pragma GCC unroll 16
      for (int w = 0; w < 16; ++w) _mm512_store_ps(block[w], r[w]);
      if (j + 16 <= tile.keys) {
        // four keys in turn: equal neighbours of one row do not wait for each other
        for (int w = 0; w < 16; w += 4) {
          float* to = sums + (j + w) * width;
          const Id* id = ids + (j + w) * 16;
          for (int64_t n = 0; n < rows; ++n) {
            to[id[n]] += block[w][n];
            to[width + id[16 + n]] += block[w + 1][n];
            to[2 * width + id[32 + n]] += block[w + 2][n];
            to[3 * width + id[48 + n]] += block[w + 3][n];
          }
        }
      } else {
        for (int64_t w = 0; w < tile.keys - j; ++w) {
          for (int64_t n = 0; n < rows; ++n) sums[(j + w) * width + ids[(j + w) * 16 + n]] += block[w][n];
        }
      }
    }
    return;
  }
#endif
  for (int64_t j = 0; j < tile.keys; ++j) {
    for (int64_t i = 0; i < rows; ++i) sums[j * width + ids[j * 16 + i]] += numbers[i * tile.stride + j];
  }
}
