// Part of rpe_attention_kernels.h: maps that are sums of two axes. The keys of an image row of one slot have the same
// buckets, those of the columns' slots; so a row of buckets is found once for each row slot, and sums are over image rows
// of one slot first, then over the columns of one slot. No ids are in memory, and no number is picked out alone.

// Scores of a tile: a row is that of the query at place `first` + row.
template <class T>
struct Tile {
  T* numbers;
  int64_t stride;  // of rows; there are 16 numbers or more behind the last key
  int64_t first, rows, keys;
};

// Queries of a tile that share an image column, or skip tokens (column -1): they begin in the tile's row `at`.
struct Segment {
  int64_t at, count, column, row;
};

// f(Segment) for all in a tile, whose queries stand column by column
template <class T, class F>
RPE_INLINE void for_segments(const Tile<T>& tile, const Map& map, const F& f) {
  const int64_t places = map.height * map.width, end = tile.first + tile.rows;
  for (int64_t place = tile.first; place < end;) {
    Segment s{place - tile.first, end - place, -1, 0};
    if (place < places) {
      s.column = place / map.height, s.row = place % map.height;
      s.count = least(s.count, map.height - s.row);
    }
    f(s);
    place += s.count;
  }
}

// f(run, begin, end) for the runs of the rows [from, from + count) of the reversed axis, counted from `from`
template <class F>
RPE_INLINE void for_runs(const Map& map, int64_t from, int64_t count, const F& f) {
  for (int64_t x = 0; x < count;) {
    const int64_t run = map.run_of[from + x], end = least(map.run_start[run + 1] - from, count);
    f(run, x, end);
    x = end;
  }
}

template <class T>
inline void clear(T* at, int64_t n) {
  for (int64_t c = 0; c < n; ++c) at[c] = T(0);
}

// N octets, or as many as `octets` says where N = 0
template <int S, int N, class T>
void fill_image_rows(T* to, const T* table, const Map& map, int64_t row, int64_t column, T* buffer) {
  const int64_t octets = N > 0 ? N : (map.width + 7) / 8;
  const int32_t* slots = map.col_slot + (map.width - 1 - column);
  for_runs(map, map.height - 1 - row, map.height, [&](int64_t run, int64_t begin, int64_t end) {
    const T* at = table + (map.row_slots - 1 - run) * map.col_slots;
    oct<T> found[N > 0 ? N : 1];
    for (int64_t n = 0; n < octets; ++n) {
      const oct<T> x = look_up8<S, T>(at, slots + 8 * n);
      if constexpr (N > 0) {
        found[n] = x;
      } else {
        store8(buffer + 8 * n, x);
      }
    }
    for (int64_t y = begin; y < end; ++y) {  // what is too long is overwritten by the next one
      for (int64_t n = 0; n < octets; ++n) {
        store8(to + y * map.width + 8 * n, N > 0 ? found[N > 0 ? n : 0] : load8(buffer + 8 * n));
      }
    }
  });
}

// to[j] = table[id of (query i, key j)]; writes up to 7 numbers behind the last key. `buffer` holds an image row.
template <class T>
void fill_by_axes(T* to, const T* table, const Map& map, int64_t i, int64_t keys, T* buffer) {
  const int64_t alone = i < map.skip ? keys : map.skip;
  for (int64_t j = 0; j < alone; ++j) to[j] = table[map.skip_id];
  if (i < map.skip) return;
  const int64_t row = (i - map.skip) / map.width, column = (i - map.skip) % map.width;
  const auto fill = [&](auto span, auto octets) {
    fill_image_rows<decltype(span)::value, decltype(octets)::value>(to + map.skip, table, map, row, column, buffer);
  };
  const auto of_span = [&](auto span) {
    switch ((map.width + 7) / 8) {
      case 1: return fill(span, Count<1>());
      case 2: return fill(span, Count<2>());
      case 3: return fill(span, Count<3>());
      case 4: return fill(span, Count<4>());
      default: return fill(span, Count<0>());
    }
  };
  if (map.col_slots <= 8) return of_span(Count<1>());
  if (map.col_slots <= 16) return of_span(Count<2>());
  of_span(Count<0>());
}

// room that sum_by_axes wants
inline int64_t axes_buffer(const Map& map) { return 8 * round_up(map.width, 8) + 16 * round_up(map.col_slots, 8); }

// sums[n] = sum of row[j] over the keys j with id n
template <class T>
void sum_by_axes(T* sums, const T* row, const Term& term, int64_t i, int64_t keys, T* buffer) {
  const Map& map = term.map;
  clear(sums, term.width);
  const int64_t alone = i < map.skip ? keys : map.skip;
  T total = 0;
  for (int64_t j = 0; j < alone; ++j) total += row[j];
  if (i < map.skip) {
    sums[map.skip_id] = total;
    return;
  }
  const int64_t w = map.width, padded = round_up(w, 8), slots8 = round_up(map.col_slots, 8);
  const int64_t from = map.height - 1 - (i - map.skip) / w;
  const int32_t* slots = map.col_slot + (w - 1 - (i - map.skip) % w);
  const T* places = row + map.skip;
  T* by_slot = buffer + 8 * padded;
  // eight runs at a time, the last first: slots count downwards along the reversed axis
  const int64_t earliest = map.run_of[from];
  for (int64_t top = map.run_of[from + map.height - 1]; top >= earliest; top -= 8) {
    const int64_t runs = least(top - earliest + 1, 8), base = map.row_slots - 1 - top;
    for (int64_t lane = 0; lane < 8; ++lane) {
      T* to = buffer + lane * padded;
      if (lane >= runs) {
        clear(to, padded);
        continue;
      }
      const int64_t first = map.run_start[top - lane] - from, begin = first > 0 ? first : 0;
      const int64_t end = least(map.run_start[top - lane + 1] - from, map.height);
      for (int64_t n = 0; n < w; n += 8) {
        oct<T> sum = load8(places + begin * w + n);
        for (int64_t y = begin + 1; y < end; ++y) sum += load8(places + y * w + n);
        store8(to + n, sum);
      }
    }
    clear(by_slot, 16 * slots8);
    for (int64_t n = 0; n < w; n += 8) {
      oct<T> r[8];
      for (int lane = 0; lane < 8; ++lane) r[lane] = load8(buffer + lane * padded + n);
      transpose8<T>(r);
      const int64_t columns = least(w - n, 8);
      for (int64_t m = 0; m < columns; ++m) {  // two sums in turn: equal neighbours do not wait
        T* to = by_slot + (2 * slots[n + m] + (m & 1)) * 8;
        store8(to, load8(to) + r[m]);
      }
    }
    for (int64_t c = 0; c < map.col_slots; c += 8) {
      oct<T> r[8];
      for (int m = 0; m < 8; ++m) r[m] = load8(by_slot + (c + m) * 16) + load8(by_slot + (c + m) * 16 + 8);
      transpose8<T>(r);
      for (int64_t lane = 0; lane < runs; ++lane) {
        T* to = sums + (base + lane) * map.col_slots + c;
        if (map.col_slots <= 8) {
          store8(to, r[lane]);  // what is too long is zero, or overwritten by the next one
        } else {
          T one[8];
          store8(one, r[lane]);
          for (int64_t m = 0; m < least(map.col_slots - c, 8); ++m) to[m] = one[m];
        }
      }
    }
  }
  if (map.skip > 0) sums[map.skip_id] = total;
}

// Terms on queries: a tile's queries of one image column, the keys of one image row. The slot of the columns is one for
// each key; those of rows are a run, eight of which are read or written of a key at once.

// Up to eight keys of an image row, against a segment and up to eight runs of its rows.
struct Cell {
  const Segment& s;
  int64_t key, keys;
  const int32_t* slots;  // the column slot of key m is slots[-m]
  int64_t from;          // where the segment begins on the reversed axis of rows
  int64_t top, last;     // runs top, top - 1, ..., last: their slots count upwards
};

// f(Cell) for all in a tile, image row after image row
template <class T, class F>
RPE_INLINE void for_cells(const Tile<T>& tile, const Map& map, const F& f) {
  for_segments(tile, map, [&](const Segment& s) {
    if (s.column < 0) return;
    const int32_t* slots = map.col_slot + (map.width - 1 + s.column);
    for (int64_t row = 0; row < map.height; ++row) {
      const int64_t from = map.height - 1 - row + s.row, earliest = map.run_of[from];
      for (int64_t top = map.run_of[from + s.count - 1]; top >= earliest; top -= 8) {
        const int64_t last = earliest > top - 7 ? earliest : top - 7;
        for (int64_t n = 0; n < map.width; n += 8) {
          f(Cell{s, map.skip + row * map.width + n, least(map.width - n, 8), slots - n, from, top, last});
        }
      }
    }
  });
}

// S[i, j] = (or +=) tables[j, id of (key j, query i)]; writes up to 7 numbers behind the last key, reads 7 rows of tables
template <bool add, class T>
void fill_tile_by_axes(const Tile<T>& tile, const T* tables, const Term& term) {
  const Map& map = term.map;
  const int64_t width = term.width;
  const auto put = [&](T* to, T x) { *to = add ? *to + x : x; };
  for_segments(tile, map, [&](const Segment& s) {
    const int64_t alone = s.column < 0 ? tile.keys : map.skip;
    for (int64_t r = s.at; r < s.at + s.count; ++r) {
      T* row = tile.numbers + r * tile.stride;
      for (int64_t j = 0; j < alone; ++j) put(row + j, tables[j * width + map.skip_id]);
    }
  });
  for_cells(tile, map, [&](const Cell& cell) {
    const T* at = tables + cell.key * width + (map.row_slots - 1 - cell.top);
    oct<T> r[8];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) r[m] = load8(at + m * width + cell.slots[-m] * map.row_slots);
    transpose8<T>(r);
    T* numbers = tile.numbers + cell.s.at * tile.stride + cell.key;
    for (int64_t run = cell.top; run >= cell.last; --run) {
      oct<T> x = r[cell.top - run];
      if (add && cell.keys < 8) x = first_of<T>(x, cell.keys);
      const int64_t first = map.run_start[run] - cell.from, begin = first > 0 ? first : 0;
      const int64_t end = least(map.run_start[run + 1] - cell.from, cell.s.count);
      for (int64_t y = begin; y < end; ++y) {
        T* to = numbers + y * tile.stride;
        store8(to, add ? load8(to) + x : x);
      }
    }
  });
}

// sums[j, n] += sum of S[i, j] over the queries i of a tile with id n; adds zeros to 7 numbers behind the last row
template <class T>
void sum_tile_by_axes(T* sums, const Tile<T>& tile, const Term& term) {
  const Map& map = term.map;
  const int64_t width = term.width;
  for_segments(tile, map, [&](const Segment& s) {
    const int64_t alone = s.column < 0 ? tile.keys : map.skip;
    for (int64_t r = s.at; r < s.at + s.count; ++r) {
      const T* row = tile.numbers + r * tile.stride;
      for (int64_t j = 0; j < alone; ++j) sums[j * width + map.skip_id] += row[j];
    }
  });
  for_cells(tile, map, [&](const Cell& cell) {
    const T* numbers = tile.numbers + cell.s.at * tile.stride + cell.key;
    oct<T> r[8];
    for (int lane = 0; lane < 8; ++lane) {
      const int64_t run = cell.top - lane;
      r[lane] = oct<T>{};
      if (run < cell.last) continue;
      const int64_t first = map.run_start[run] - cell.from, begin = first > 0 ? first : 0;
      const int64_t end = least(map.run_start[run + 1] - cell.from, cell.s.count);
      for (int64_t y = begin; y < end; ++y) r[lane] += load8(numbers + y * tile.stride);
    }
    transpose8<T>(r);
    T* to = sums + cell.key * width + (map.row_slots - 1 - cell.top);
    for (int64_t m = 0; m < cell.keys; ++m) {
      T* at = to + m * width + cell.slots[-m] * map.row_slots;
      store8(at, load8(at) + r[m]);
    }
  });
}
