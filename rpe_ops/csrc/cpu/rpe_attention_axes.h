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

// Those of a tile, whose queries stand column by column.
struct Segments {
  Segment all[33];
  int64_t count = 0;
  template <class T>
  Segments(const Tile<T>& tile, const Map& map) {
    const int64_t places = map.height * map.width, end = tile.first + tile.rows;
    for (int64_t place = tile.first; place < end; place += all[count++].count) {
      Segment s{place - tile.first, end - place, -1, 0};
      if (place < places) {
        s.column = place / map.height, s.row = place % map.height;
        s.count = least(s.count, map.height - s.row);
      }
      all[count] = s;
    }
  }
  const Segment* begin() const { return all; }
  const Segment* end() const { return all + count; }
};

// Keys that a tile has at a time: `skip` of them without a place, then the image rows [first, first + rows).
struct KeyRows {
  int64_t skip, first, rows;
  explicit KeyRows(const Map& map) : skip(map.skip), first(0), rows(map.height) {}
  KeyRows(int64_t skip, int64_t first, int64_t rows) : skip(skip), first(first), rows(rows) {}
};

// The rows [from, from + count) of the reversed axis; runs first, first + 1, ..., last.
struct Window {
  int64_t from, first, last;
  Window(const Map& map, int64_t row, int64_t count)
      : from(row), first(map.run_of[row]), last(map.run_of[row + count - 1]) {}
  // of a query in an image row
  Window(const Map& map, const KeyRows& keys, int64_t row) : Window(map, map.height - 1 - row + keys.first, keys.rows) {}
};

// N octets, or as many as `octets` says where N = 0
template <int S, int N, class T>
void fill_image_rows(T* to, const T* table, const Map& map, const KeyRows& keys, int64_t row, int64_t column, T* buffer) {
  const int64_t octets = N > 0 ? N : (map.width + 7) / 8;
  const int32_t* slots = map.col_slot + (map.width - 1 - column);
  const Window window(map, keys, row);
  for (int64_t run = window.first; run <= window.last; ++run) {
    const T* at = table + (map.row_slots - 1 - run) * map.col_slots;
    T* found = buffer + 8 * octets * (run - window.first);
    for (int64_t n = 0; n < octets; ++n) store8(found + 8 * n, look_up8<S, T>(at, slots + 8 * n));
  }
  for (int64_t y = 0; y < keys.rows; ++y) {  // what is too long is overwritten by the next one
    const T* found = buffer + 8 * octets * (map.run_of[window.from + y] - window.first);
    for (int64_t n = 0; n < octets; ++n) store8(to + y * map.width + 8 * n, load8(found + 8 * n));
  }
}

#ifdef RPE_AVX512
// The same by sixteens, for slots below 16.
template <int N>
void fill_image_rows_16(float* to, const float* table, const Map& map, const KeyRows& keys, int64_t row, int64_t column,
                        float* buffer) {
  const int64_t parts = N > 0 ? N : (map.width + 15) / 16;
  const int32_t* slots = map.col_slot + (map.width - 1 - column);
  const Window window(map, keys, row);
  for (int64_t run = window.first; run <= window.last; ++run) {
    const __m512 at = _mm512_loadu_ps(table + (map.row_slots - 1 - run) * map.col_slots);
    float* found = buffer + 16 * parts * (run - window.first);
    for (int64_t n = 0; n < parts; ++n) {
      _mm512_storeu_ps(found + 16 * n, _mm512_permutexvar_ps(_mm512_loadu_si512(slots + 16 * n), at));
    }
  }
  for (int64_t y = 0; y < keys.rows; ++y) {
    const float* found = buffer + 16 * parts * (map.run_of[window.from + y] - window.first);
    for (int64_t n = 0; n < parts; ++n) _mm512_storeu_ps(to + y * map.width + 16 * n, _mm512_loadu_ps(found + 16 * n));
  }
}
#endif

// to[j] = table[id of (query i, key j)] for `count` keys; writes up to 15 numbers behind the last one. `buffer` holds image
// rows, one of each run.
template <class T>
void fill_by_axes(T* to, const T* table, const Map& map, int64_t i, const KeyRows& keys, int64_t count, T* buffer) {
  const int64_t alone = i < map.skip ? count : keys.skip;
  for (int64_t j = 0; j < alone; ++j) to[j] = table[map.skip_id];
  if (i < map.skip) return;
  const int64_t row = (i - map.skip) / map.width, column = (i - map.skip) % map.width;
#ifdef RPE_AVX512
  if constexpr (sizeof(T) == 4) {
    const auto fill = [&](auto parts) {
      fill_image_rows_16<decltype(parts)::value>(to + keys.skip, table, map, keys, row, column, buffer);
    };
    if (map.col_slots <= 16 && map.width <= 16) return fill(Count<1>());
    if (map.col_slots <= 16 && map.width <= 32) return fill(Count<2>());
    if (map.col_slots <= 16) return fill(Count<0>());
  }
#endif
  const auto fill = [&](auto span, auto octets) {
    fill_image_rows<decltype(span)::value, decltype(octets)::value>(to + keys.skip, table, map, keys, row, column, buffer);
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

// room that rows want: image rows of each run, for eight queries, and the columns' slots
inline int64_t axes_buffer(const Map& map) {
  return 8 * round_up(least(map.row_slots, map.height), 8) * round_up(map.width, 8) + 8 * round_up(map.col_slots, 8);
}

// by_run[last run - run] = sum of the image rows of a run, whose sum so far stands there until its last row
template <int N, class T>
void add_up_runs(T* by_run, const T* places, const Map& map, int64_t rows, const Window& window) {
  const int64_t w = map.width, padded = round_up(w, 8);
  const int32_t *runs = map.run_of + window.from, *goes_on = map.goes_on + window.from;
  for (int64_t first = 0; first < padded; first += 8 * N) {
    oct<T> sum[N] = {};
    for (int64_t y = 0; y < rows; ++y) {
      const oct_bits<T> same = oct_bits<T>{} + goes_on[y];
      T* to = by_run + (window.last - runs[y]) * padded + first;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const oct<T> x = load8(places + y * w + first + 8 * n);
        sum[n] = y == 0 ? x : keep_bits<T>(sum[n], same) + x;
        store8(to + 8 * n, sum[n]);
      }
    }
  }
}

// sums[id] = sums of eight runs at a time by the columns' slots
template <class T>
void sum_columns(T* sums, const T* by_run, const Map& map, const Window& window, int64_t column, T* by_slot) {
  const int32_t *slots = map.col_slot + column, *goes_on = map.col_goes_on + column;
  const int64_t w = map.width, padded = round_up(w, 8), slots8 = round_up(map.col_slots, 8);
  // the last run first: slots count downwards along the reversed axis
  for (int64_t top = window.last; top >= window.first; top -= 8) {
    const int64_t lanes = least(top - window.first + 1, 8), base = map.row_slots - 1 - top;
    const T* totals = by_run + (window.last - top) * padded;
    clear(by_slot, 8 * slots8);
    oct<T> sum{};
    for (int64_t n = 0; n < w; n += 8) {
      oct<T> r[8];
#pragma GCC unroll 8
      for (int lane = 0; lane < 8; ++lane) r[lane] = load8(totals + lane * padded + n);
      transpose8<T>(r);
      const int64_t columns = least(w - n, 8);
      for (int64_t m = 0; m < columns; ++m) {  // the sum so far of a slot stands there until its last column
        sum = keep_bits<T>(sum, oct_bits<T>{} + goes_on[n + m]) + r[m];
        store8(by_slot + 8 * slots[n + m], sum);
      }
    }
    for (int64_t c = 0; c < map.col_slots; c += 8) {
      oct<T> r[8];
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m) r[m] = load8(by_slot + (c + m) * 8);
      transpose8<T>(r);
      for (int64_t lane = 0; lane < lanes; ++lane) {
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
}

// sums[n] = sum of row[j] over the keys j with id n, of `number`, for at most eight rows whose queries are i[0], i[1], ...;
// each step is taken for all of them, so that no row waits for its own sums. Writes zeros to 7 numbers behind.
template <class T>
void sum_by_axes(T* sums, const T* rows, int64_t stride, const int64_t* i, int64_t count, const Term& term,
                 const KeyRows& keys, int64_t number, T* buffer) {
  const Map& map = term.map;
  const int64_t w = map.width, padded = round_up(w, 8);
  const int64_t size = round_up(least(map.row_slots, map.height), 8) * padded;
  const auto window_of = [&](int64_t r) { return Window(map, keys, (i[r] - map.skip) / w); };
  for (int64_t r = 0; r < count; ++r) {
    if (i[r] < map.skip) continue;
    const Window window = window_of(r);
    T* by_run = buffer + r * size;
    const T* places = rows + r * stride + keys.skip;
    switch (padded / 8) {
      case 1: add_up_runs<1>(by_run, places, map, keys.rows, window); break;
      case 2: add_up_runs<2>(by_run, places, map, keys.rows, window); break;
      case 3: add_up_runs<3>(by_run, places, map, keys.rows, window); break;
      case 4: add_up_runs<4>(by_run, places, map, keys.rows, window); break;
      default: add_up_runs<1>(by_run, places, map, keys.rows, window);
    }
    const int64_t used = window.last - window.first + 1;
    clear(by_run + used * padded, (round_up(used, 8) - used) * padded);
  }
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows + r * stride;
    T *to = sums + r * term.width, total = 0;
    clear(to, term.width);
    const int64_t alone = i[r] < map.skip ? number : keys.skip;
    for (int64_t j = 0; j < alone; ++j) total += row[j];
    if (i[r] >= map.skip) {
      sum_columns(to, buffer + r * size, map, window_of(r), w - 1 - (i[r] - map.skip) % w, buffer + 8 * size);
    }
    if (map.skip > 0) to[map.skip_id] = total;
  }
}

// ---- terms on queries: a tile's queries of one image column, the keys of one image row. The slot of the columns is one
// for each key; those of rows are a run, eight of which are read or written of a key at once.

// Up to eight keys of an image row, against a segment and up to eight runs of its rows.
struct Cell {
  const Segment& s;
  int64_t key, keys;
  const int32_t* slots;  // the column slot of key m is slots[-m]
  int64_t top;           // runs top, top - 1, ..., at most eight: their slots count upwards
  const int32_t* runs;   // of the segment's queries
  int64_t begin, end;    // those with these runs
};

// f(Cell) for a tile and its image rows of keys [begin, end), counted from the first of `keys`
template <class F>
RPE_INLINE void for_cells(const Segments& segments, const Map& map, const KeyRows& keys, int64_t begin, int64_t end,
                          const F& f) {
  for (int64_t row = begin; row < end; ++row) {
    for (const Segment& s : segments) {
      if (s.column < 0) continue;
      const int32_t* slots = map.col_slot + (map.width - 1 + s.column);
      const Window window(map, map.height - 1 - (keys.first + row) + s.row, s.count);
      for (int64_t top = window.last; top >= window.first; top -= 8) {
        const int64_t last = most(top - 7, window.first);
        const int64_t from = most(map.run_start[last] - window.from, 0);
        const int64_t to = least(map.run_start[top + 1] - window.from, s.count);
        for (int64_t n = 0; n < map.width; n += 8) {
          f(Cell{s, keys.skip + row * map.width + n, least(map.width - n, 8), slots - n, top,
                 map.run_of + window.from, from, to});
        }
      }
    }
  }
}

// S[i, j] += tables[j, id of (key j, query i)] for the keys that are alone in their bucket: skip tokens, and all for those
template <class T>
void add_skip_bucket(const Tile<T>& tile, const T* tables, const Term& term, const KeyRows& keys) {
  for (const Segment& s : Segments(tile, term.map)) {
    const int64_t alone = s.column < 0 ? tile.keys : keys.skip;
    for (int64_t r = s.at; r < s.at + s.count; ++r) {
      T* row = tile.numbers + r * tile.stride;
      for (int64_t j = 0; j < alone; ++j) row[j] += tables[j * term.width + term.map.skip_id];
    }
  }
}

// The same for the image rows of keys [begin, end), counted from their first. Adds zeros to 7 numbers behind, reads 7 rows of
// tables more.
template <class T>
void add_by_axes(const Tile<T>& tile, const T* tables, const Term& term, const KeyRows& keys, int64_t begin,
                 int64_t end) {
  const Map& map = term.map;
  const int64_t width = term.width;
  for_cells(Segments(tile, map), map, keys, begin, end, [&](const Cell& cell) {
    const T* at = tables + cell.key * width + (map.row_slots - 1 - cell.top);
    oct<T> r[8];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) r[m] = load8(at + m * width + cell.slots[-m] * map.row_slots);
    transpose8<T>(r);
    T by_run[8 * 8];
#pragma GCC unroll 8
    for (int lane = 0; lane < 8; ++lane) {
      store8(by_run + 8 * lane, cell.keys < 8 ? first_of<T>(r[lane], cell.keys) : r[lane]);
    }
    T* numbers = tile.numbers + cell.s.at * tile.stride + cell.key;
    for (int64_t y = cell.begin; y < cell.end; ++y) {
      T* to = numbers + y * tile.stride;
      store8(to, load8(to) + load8(by_run + 8 * (cell.top - cell.runs[y])));
    }
  });
}

// sums[j, n] += sum of S[i, j] over the queries i of a tile with id n; adds zeros to 7 numbers behind the last row
template <class T>
void sum_tile_by_axes(T* sums, const Tile<T>& tile, const Term& term) {
  const Map& map = term.map;
  const int64_t width = term.width;
  const Segments segments(tile, map);
  for (const Segment& s : segments) {
    const int64_t alone = s.column < 0 ? tile.keys : map.skip;
    for (int64_t r = s.at; r < s.at + s.count; ++r) {
      const T* row = tile.numbers + r * tile.stride;
      for (int64_t j = 0; j < alone; ++j) sums[j * width + map.skip_id] += row[j];
    }
  }
  for_cells(segments, map, KeyRows(map), 0, map.height, [&](const Cell& cell) {
    const T* numbers = tile.numbers + cell.s.at * tile.stride + cell.key;
    const int32_t* goes_on = map.goes_on + (cell.runs - map.run_of);
    T by_run[8 * 8] = {};
    oct<T> sum{};
    for (int64_t y = cell.begin; y < cell.end; ++y) {
      const oct<T> x = load8(numbers + y * tile.stride);
      sum = y == cell.begin ? x : keep_bits<T>(sum, oct_bits<T>{} + goes_on[y]) + x;
      store8(by_run + 8 * (cell.top - cell.runs[y]), sum);
    }
    oct<T> r[8];
#pragma GCC unroll 8
    for (int lane = 0; lane < 8; ++lane) r[lane] = load8(by_run + 8 * lane);
    transpose8<T>(r);
    T* to = sums + cell.key * width + (map.row_slots - 1 - cell.top);
    for (int64_t m = 0; m < cell.keys; ++m) {
      T* at = to + m * width + cell.slots[-m] * map.row_slots;
      store8(at, load8(at) + r[m]);
    }
  });
}
