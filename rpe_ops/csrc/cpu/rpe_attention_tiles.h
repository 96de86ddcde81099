// Part of rpe_attention_kernels.h: what a thread does with a tile, some queries of one head against all keys.

// ---- dropout: weight (b, h, i, j) is dropped iff mix(key(seed, b, h, i) ^ j) >> 8 is below p * 2^24

RPE_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
inline uint32_t dropout_key(uint64_t seed, int64_t head, int64_t i) {
  const uint32_t key = mix(mix(uint32_t(seed) + 0x9e3779b9u) ^ uint32_t(seed >> 32));
  return mix(mix(key ^ uint32_t(head)) ^ uint32_t(i));
}
// keep[j] = 1 / (1 - p) or 0, for key first + j
template <class T>
void dropout_row(T* __restrict keep, double p, uint32_t key, int64_t first, int64_t n) {
  const int32_t least = int32_t(p * 16777216.0 + 0.5);
  const T factor = p < 1 ? T(1 / (1 - p)) : T(0);
  for (int64_t j = 0; j < n; ++j) keep[j] = int32_t(mix(key ^ uint32_t(first + j)) >> 8) < least ? T(0) : factor;
}

// ---- the tile

// What a thread keeps of a term, all but `table` where it has a weight. On queries an exact W comes with the scale.
template <class X>
struct Weight {
  typename X::Matrix down;  // (D, width): W, on values its transpose
  typename X::Matrix up;    // (width, Dp): the transpose of W, on values W
  typename X::Matrix tile;  // (tile, width): rows of the table of a tile's queries, then those of its gradient; on
                            // values first those of the bucket sums' gradient, then the sums
  typename X::Matrix table;  // (L8, width): on queries the gradient of the table of all keys
  typename X::Number* gradient = nullptr;  // of W, laid out as W is
  int64_t loaded = -1;                     // where the W begins that `down` and `up` are of
};

// The keys that a tile has at a time: all, or the block `n` of them.
struct Block {
  int64_t n, first, keys, padded;  // padded to whole vectors
  KeyRows rows;                    // of a block
};

template <class X>
struct Worker {
  using T = typename X::Number;
  using Item = typename X::Item;
  using Matrix = typename X::Matrix;
  static constexpr int W = simd<T>::W;
  const Problem& p;
  const int64_t blocks = p.blocks.count(), most_keys = blocks > 1 ? p.blocks.keys(0) : p.Lk;  // of a block
  const int64_t Dp = round_up(p.D, W > 8 ? W : 8), Lp = round_up(most_keys, W), L16 = round_up(most_keys, 16);
  const int64_t L8 = blocks > 1 ? blocks * L16 : round_up(p.Lk, 8);  // rows of all keys, those of a block behind L16
  const int64_t ld = (L16 + 16) % 512 == 0 ? L16 + 32 : L16 + 16;  // of scores: no 4 KiB between rows
  const bool backward = p.backward;
  // rounded queries would be rounded again by the scale: they get it behind their products
  const T early = X::rounds ? T(1) : T(p.scale), late = X::rounds ? T(p.scale) : T(1);
  Arena<T> arena;
  Matrix keys, values, query, grad, scores, weights_grad;
  int64_t num_sums = 0;  // of a head in the backward: gradients of keys, of values, of tables, of W, behind each other
  T *sums = nullptr, *total = nullptr, *next_sum = nullptr;
  Item *keys_t, *values_t = nullptr;
  T *result, *mask_row, *keep, *row_table, *bias, *second, *buffer, *grad_k = nullptr, *grad_v = nullptr, *tables_q;
  int32_t* ids;
  Groups<T> groups;
  Block now = block(0);
  Weight<X> *weights_q, *weights_k, *weights_v;
  int64_t head = -1, b = 0, h = 0;
  bool mask_ready = false;

  Worker(const Problem& problem, char* scratch) : p(problem), arena{scratch} {
    const int64_t M = p.tile;
    // what is read once lies where something else is needed later
    keys_t = arena.template array<Item>(blocks * Lp * X::items(p.D));
    if (backward) {
      keys = X::input(arena, L16, Dp, true);
      values_t = arena.template array<Item>(Lp * X::items(p.D));
      num_sums = count_sums();
      sums = next_sum = arena.take(num_sums);
      if (p.parts > 1) total = arena.take(num_sums);
      grad_k = take_sums(L16 * Dp);
      grad_v = take_sums(L16 * Dp);
      values.rows = reinterpret_cast<Item*>(grad_k);
    } else {
      keys = values = X::input(arena, blocks * L16, Dp, true);
    }
    query = X::input(arena, M, Dp, backward);
    if (backward) grad = X::input(arena, M, Dp, true);
    scores = X::over(arena, arena.take(M * ld), M, ld, !backward, backward);
    if (backward) weights_grad = X::over(arena, arena.take(M * ld), M, ld, true, true);
    result = arena.take(M * Dp);
    mask_row = p.mask.data != nullptr ? arena.take(L16) : nullptr;
    keep = p.dropout_p > 0 ? arena.take(L16) : nullptr;
    int64_t widest = W, total = 0, room = 16, ids_bytes = 0, rows = 0;
    const auto look_at = [&](const Term* terms, int64_t count, bool on_q) {
      for (int64_t t = 0; t < count; ++t) {
        const Map& map = terms[t].map;
        if (on_q) {
          total += terms[t].width;
        } else {
          widest = most(widest, terms[t].width);
        }
        room = most(room, map.kind == Map::axes ? axes_buffer(map) : map.height * map.width + 16);
        if (map.kind != Map::axes) {
          ids_bytes = most(ids_bytes, (on_q ? 16 * p.Lk + 16 : L16) * (terms[t].narrow ? 1 : 4));
          rows = most(rows, map.height);
        }
      }
    };
    look_at(p.on_q, p.num_q, true);
    look_at(p.on_k, p.num_k, false);
    look_at(p.on_v, p.num_v, false);
    row_table = arena.take(8 * widest);
    bias = p.num_k + p.num_v > 0 ? arena.take(L16) : nullptr;
    second = p.num_k > 1 || p.num_v > 1 ? arena.take(L16) : nullptr;
    buffer = arena.take(room);
    ids = arena.template array<int32_t>(ids_bytes / 4);
    groups = {arena.template array<const T*>(rows), arena.template array<const void*>(rows), buffer};
    tables_q = arena.take(total * (L8 + 8));
    weights_q = weights(p.on_q, p.num_q, true, backward, 0, backward ? L8 : 0);
    weights_k = weights(p.on_k, p.num_k, true, backward, M, 0);
    weights_v = weights(p.on_v, p.num_v, backward, !backward, M, 0);
  }

  Block block(int64_t n) const {
    if (blocks == 1) return {0, 0, p.Lk, Lp, {0, 0, 0}};
    const int64_t keys = p.blocks.keys(n);
    const KeyRows rows(n == 0 ? p.blocks.skip : 0, n * p.blocks.rows, p.blocks.rows_of(n));
    return {n, p.blocks.first_key(n), keys, round_up(keys, W), rows};
  }
  KeyRows rows_of(const Map& map) const { return blocks == 1 ? KeyRows(map) : now.rows; }
  // of rows of all keys those of the block
  Matrix of_block(const Matrix& of) const {
    const int64_t at = now.n * L16;
    T* numbers = of.numbers == nullptr ? nullptr : of.numbers + at * Dp;
    return {numbers, of.rows + X::items(at * Dp), of.pairs + X::items(at) * Dp};
  }

  int64_t count_sums() const {
    int64_t count = 2 * L16 * Dp;
    for (int64_t t = 0; t < p.num_q; ++t) count += L8 * p.on_q[t].width;
    for (int64_t t = 0; t < p.num_k; ++t) count += p.on_k[t].weight ? Dp * p.on_k[t].width : 0;
    for (int64_t t = 0; t < p.num_v; ++t) count += p.on_v[t].weight ? Dp * p.on_v[t].width : 0;
    return count;
  }
  T* take_sums(int64_t n) {
    if (sums == nullptr) return nullptr;
    T* at = next_sum;
    next_sum += n;
    return at;
  }

  Weight<X>* weights(const Term* terms, int64_t count, bool down, bool up, int64_t tile, int64_t table) {
    Weight<X>* all = arena.template array<Weight<X>>(count);
    for (int64_t t = 0; t < count; ++t) {
      Weight<X> one;
      const int64_t width = terms[t].width;
      const bool weight = terms[t].weight;
      if (table > 0) one.table = X::over(arena, take_sums(table * width), table, width, weight, weight);
      if (weight) {
        if (down) one.down = X::over(arena, arena.take(p.D * width), p.D, width, false, true);
        if (up) one.up = X::over(arena, arena.take(width * Dp), width, Dp, false, true);
        if (tile > 0) one.tile = X::over(arena, arena.take(tile * width), tile, width, true, true);
        if (backward) one.gradient = table > 0 ? arena.take(Dp * width) : take_sums(Dp * width);
      }
      if (all != nullptr) all[t] = one;
    }
    return all;
  }

  // W of this head, in the forms that are wanted of it; heads that share it, and follow each other, share these
  bool is_loaded(Weight<X>& to, const Term& term) {
    const int64_t at = row_of(term.table, 0, h, 0);
    const bool same = to.loaded == at;
    to.loaded = at;
    return same;
  }
  void load_weight(Weight<X>& to, const Term& term, T factor) {
    const int64_t width = term.width;
    if (is_loaded(to, term)) return;
    for (int64_t d = 0; d < p.D; ++d) {
      T* row = to.down.numbers + d * width;
      load_table(row, term, term.table, row_of(term.table, 0, h, d), factor);
      clear(row + term.used, width - term.used);
    }
    X::make_pairs(to.down, p.D, width);
    if (!backward) return;
    transpose(to.up.numbers, Dp, to.down.numbers, width, p.D, width);
    X::make_pairs(to.up, width, Dp);
  }
  void load_weight_on_values(Weight<X>& to, const Term& term) {
    if (is_loaded(to, term)) return;
    if (!backward) {
      for (int64_t c = 0; c < term.used; ++c) {
        T* row = to.up.numbers + c * Dp;
        load_row<T>(row, term.table, row_of(term.table, 0, h, term.columns[c]), p.D);
        clear(row + p.D, Dp - p.D);
      }
      clear(to.up.numbers + term.used * Dp, (term.width - term.used) * Dp);
      X::make_pairs(to.up, term.width, Dp);
    } else {
      for (int64_t c = 0; c < term.used; ++c) {
        const int64_t at = row_of(term.table, 0, h, term.columns[c]);
        for (int64_t d = 0; d < p.D; ++d) {
          to.down.numbers[d * term.width + c] = get<T>(term.table.data, at + d * term.table.d, term.table.storage);
        }
      }
      for (int64_t d = 0; d < p.D; ++d) {
        clear(to.down.numbers + d * term.width + term.used, term.width - term.used);
      }
      X::make_pairs(to.down, p.D, term.width);
    }
  }

  // to (cols, ld) = from (rows, cols)^T, zeros behind
  static void transpose(T* to, int64_t ld, const T* from, int64_t from_ld, int64_t rows, int64_t cols) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r) to[c * ld + r] = from[r * from_ld + c];
      clear(to + c * ld + rows, ld - rows);
    }
  }

  // the block's rows of view, padded with zeros to (L16, Dp)
  void load_rows(const Matrix& to, const View& view) {
    for (int64_t l = 0; l < now.keys; ++l) {
      if (l + 8 < now.keys) fetch(view, head, now.first + l + 8);
      X::load_row(to, l * Dp, view, row_of(view, b, h, now.first + l), p.D, T(1));
      X::clear_row(to, l * Dp + p.D, Dp - p.D);
    }
    X::clear_row(to, now.keys * Dp, (L16 - now.keys) * Dp);
  }
  // to = the block's rows of view, transposed, in panels, and `rows` as well where they are wanted; they are on the way where
  // view is not read as it lies
  void pack(Item* to, const View& view, const Matrix& rows, bool wanted) {
    const Item* from = X::in_place(view, row_of(view, b, h, now.first));
    if (from != nullptr && !wanted) {
      pack_transposed<X>(to, from, view.l, now.keys, p.D, reinterpret_cast<Item*>(result));
    } else {
      load_rows(rows, view);
      pack_transposed<X>(to, rows.rows, Dp, now.keys, p.D, nullptr);
    }
  }
  // those of a tile's queries, padded with zeros to whole eights
  void load_queries(const Matrix& to, const View& view, int64_t first, int64_t rows, T factor) {
    for (int64_t r = 0; r < rows; ++r) {
      X::load_row(to, r * Dp, view, row_of(view, b, h, p.query_at(first + r)), p.D, factor);
      X::clear_row(to, r * Dp + p.D, Dp - p.D);
    }
    X::clear_row(to, rows * Dp, (round_up(rows, 8) - rows) * Dp);
  }

  // rows that another head, or a later tile, reads soon; they lie far apart, so that no processor sees them coming
  void fetch(const View& view, int64_t of_head, int64_t l) {
    const int64_t size = view.storage == Storage::f64 ? 8 : view.storage == Storage::f32 ? 4 : 2;
    const char* at = view.data + row_of(view, of_head / p.H, of_head % p.H, l) * size;
    if (view.d != 1) return;
    for (int64_t c = 0; c < p.D * size; c += 64) __builtin_prefetch(at + c, 0, 2);
  }
  void fetch_queries(const View& view, const Tile<T>& tile) {
    for (int64_t r = 0; r < least(p.tile, p.Lq - tile.first); ++r) fetch(view, head, p.query_at(tile.first + r));
  }
  // the share of a tile in the keys and values of the next head
  void fetch_next(int64_t tile) {
    if (head + 1 >= p.B * p.H) return;
    const int64_t share = (p.Lk + p.tiles - 1) / p.tiles, end = least((tile + 1) * share, p.Lk);
    for (int64_t l = tile * share; l < end; ++l) {
      fetch(p.k, head + 1, l);
      fetch(p.v, head + 1, l);
    }
  }

  Item* keys_t_of_block() const { return keys_t + now.n * Lp * X::items(p.D); }

  void enter(int64_t next) {
    head = next;
    b = head / p.H;
    h = head % p.H;
    mask_ready = false;
    bool as_rows = backward;
    for (int64_t t = 0; t < p.num_q; ++t) as_rows = as_rows || p.on_q[t].weight;
    for (int64_t n = 0; n < blocks; ++n) {
      now = block(n);
      pack(keys_t_of_block(), p.k, of_block(keys), as_rows);
    }
    T* at = tables_q;
    for (int64_t t = 0; t < p.num_q; ++t) {
      const Term& term = p.on_q[t];
      if (term.weight) {
        load_weight(weights_q[t], term, early);
        by_weight({keys.rows, Dp}, L8, weights_q[t].down, term, {at, term.width, false, late});
      } else {
        for (int64_t n = 0; n < blocks; ++n) {
          now = block(n);
          for (int64_t j = 0; j < now.keys; ++j) {
            load_table(at + (n * L16 + j) * term.width, term, term.table, row_of(term.table, b, h, now.first + j));
          }
        }
      }
      at += (L8 + 8) * term.width;
    }
    if (!backward) {
      for (int64_t n = 0; n < blocks; ++n) {
        now = block(n);
        load_rows(of_block(values), p.v);
        X::pair_rows(of_block(values), now.keys, Dp);
      }
    } else {
      X::pair_rows(keys, p.Lk, Dp);
      pack(values_t, p.v, values, false);
    }
    for (int64_t t = 0; t < p.num_k; ++t) {
      if (!p.on_k[t].weight) continue;
      load_weight(weights_k[t], p.on_k[t], T(1));
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      if (!p.on_v[t].weight) continue;
      load_weight_on_values(weights_v[t], p.on_v[t]);
    }
  }

  // (M, width) = (M, D) W
  void by_weight(Rows<const Item> from, int64_t M, const Matrix& weight, const Term& term, Sums<T> to) {
    product<X, false>(M, term.width / W, p.D, from, {weight.pairs, term.width}, to);
  }

  // ---- encodings

  // row r of the table of query i
  const T* table_row(const Term& term, const Weight<X>& weight, int64_t r, int64_t i) {
    if (term.weight) return weight.tile.numbers + r * term.width;
    load_table(row_table, term, term.table, row_of(term.table, b, h, i));
    return row_table;
  }

  // row[j] = what the tables of query i, row r of the tile, have for key j, of all terms
  void fill_row(T* row, const Term* terms, int64_t count, const Weight<X>* weights, int64_t r, int64_t i) {
    for (int64_t t = 0; t < count; ++t) {
      const Term& term = terms[t];
      const T* table = table_row(term, weights[t], r, i);
      T* to = t == 0 ? row : second;
      if (term.map.kind == Map::axes) {
        fill_by_axes(to, table, term.map, i, rows_of(term.map), now.keys, buffer);
      } else if (term.narrow) {
        fill_by_ids(to, table, term, i, p.Lk, reinterpret_cast<uint8_t*>(ids));
      } else {
        fill_by_ids(to, table, term, i, p.Lk, ids);
      }
      for (int64_t j = 0; t > 0 && j < now.padded; j += W) store(row + j, load(row + j) + load(second + j));
    }
    clear(row + now.keys, L16 - now.keys);
  }

  // The sums of a tile's rows r, r + 1, ... by the buckets of their queries, at most eight, go where they are wanted; those of
  // blocks before this one are there, and are multiplied with `earlier`.
  void sum_rows(const Tile<T>& tile, int64_t r, const Term& term, const Weight<X>& weight, const T* factor,
                const T* earlier = nullptr) {
    const int64_t count = least(tile.rows - r, 8);
    const T* rows = tile.numbers + r * ld;
    int64_t i[8];
    for (int64_t n = 0; n < count; ++n) i[n] = p.query_at(tile.first + r + n);
    if (term.map.kind == Map::axes) {
      sum_by_axes(row_table, rows, ld, i, count, term, rows_of(term.map), now.keys, buffer);
    }
    for (int64_t n = 0; n < count; ++n) {
      T* sums = row_table + n * term.width;
      if (term.map.kind != Map::axes) {
        sums = row_table;
        if (term.narrow) {
          sum_by_ids(sums, rows + n * ld, term, i[n], p.Lk, reinterpret_cast<uint8_t*>(ids), groups);
        } else {
          sum_by_ids(sums, rows + n * ld, term, i[n], p.Lk, ids, groups);
        }
      }
      if (term.weight) {
        T* to = weight.tile.numbers + (r + n) * term.width;
        for (int64_t c = 0; c < term.width; c += W) {
          store(to + c, now.n == 0 ? load(sums + c) : load(to + c) * earlier[r + n] + load(sums + c));
        }
      } else {
        store_table(term, term.result, row_of(term.result, b, h, i[n]), sums, factor == nullptr ? T(1) : factor[r + n]);
      }
    }
  }

  // f(ids of 16 queries, their first row) for all in a tile
  template <class Id, class F>
  void for_blocks(const Tile<T>& tile, const Map& map, Id* block, const F& f) {
    for (int64_t at = 0; at < tile.rows; at += 16) {
      ids_of_block(block, p, map, tile.first + at);
      f(block, at);
    }
  }

  // S[i, j] += what the table of key j has for query i
  void add_tables(const Tile<T>& tile, const T* tables, const Term& term) {
    const auto add = [&](const auto* block, int64_t at) { add_block(tile, at, tables, term, block); };
    if (term.narrow) return for_blocks(tile, term.map, reinterpret_cast<uint8_t*>(ids), add);
    for_blocks(tile, term.map, ids, add);
  }

  // sums[j] += the sums of S[i, j] by the buckets of key j
  void sum_tile(T* sums, const Tile<T>& tile, const Term& term) {
    if (term.map.kind == Map::axes) return sum_tile_by_axes(sums, tile, term);
    const auto sum = [&](const auto* block, int64_t at) { sum_block(sums, tile, at, term, block); };
    if (term.narrow) return for_blocks(tile, term.map, reinterpret_cast<uint8_t*>(ids), sum);
    for_blocks(tile, term.map, ids, sum);
  }

  // ---- scores

  // what all keys need of a tile: its queries, and the tables of encodings on keys
  void begin_tile(const Tile<T>& tile) {
    const int64_t padded = round_up(tile.rows, 8);
    load_queries(query, p.q, tile.first, tile.rows, early);
    for (int64_t t = 0; t < p.num_k; ++t) {
      const Term& term = p.on_k[t];
      if (!term.weight) continue;
      by_weight({query.rows, Dp}, padded, weights_k[t].down, term,
                {weights_k[t].tile.numbers, term.width, false, late});
    }
  }

  // scale q k^T and the encodings on queries, for the keys of the block
  void score_tile(const Tile<T>& tile) {
    const int64_t padded = round_up(tile.rows, 8), vectors = now.padded / W;
    const KeyRows seen = blocks == 1 ? KeyRows(p.skip, 0, p.height) : now.rows;
    const Item* panels = keys_t_of_block();
    // a few columns of the tile at a time, while they are near
    for (int64_t n = 0, done = 0; n < vectors;) {
      const int64_t count = panel_of(vectors - n), begin = n * W;
      product<X, false>(padded, count, p.D, {query.rows, Dp}, {panels + begin * X::items(p.D), 0, true},
                        {tile.numbers + begin, ld, false, late});
      n += count;
      const int64_t columns = n * W - seen.skip, rows = columns < 0 ? 0 : least(columns / most(p.width, 1), seen.rows);
      const T* at = tables_q;
      for (int64_t t = 0; t < p.num_q && rows > done; ++t) {
        const Term& term = p.on_q[t];
        if (term.map.kind == Map::axes) {
          add_by_axes(tile, at + now.n * L16 * term.width, term, rows_of(term.map), done, rows);
        }
        at += (L8 + 8) * p.on_q[t].width;
      }
      done = rows;
    }
    const T* at = tables_q;
    for (int64_t t = 0; t < p.num_q; ++t) {
      if (p.on_q[t].map.kind == Map::axes) {
        add_skip_bucket(tile, at + now.n * L16 * p.on_q[t].width, p.on_q[t], rows_of(p.on_q[t].map));
      } else {
        add_tables(tile, at, p.on_q[t]);
      }
      at += (L8 + 8) * p.on_q[t].width;
    }
  }

  void read_mask(int64_t i) {
    if (mask_ready && p.mask.l == 0) return;
    load_row<T>(mask_row, p.mask, row_of(p.mask, b, h, i) + now.first * p.mask.d, now.keys);
    for (int64_t j = now.keys; j < now.padded; ++j) mask_row[j] = T(0);
    mask_ready = true;
  }

  // f(the scores of row r of the tile, with the encodings on keys, and the mask): nothing beyond the last key
  template <class F>
  void with_scores(T* row, int64_t r, int64_t i, const F& f) {
    if (p.num_k > 0) fill_row(bias, p.on_k, p.num_k, weights_k, r, i);
    if (p.mask.data != nullptr) read_mask(i);
    for (int64_t j = now.keys; j < now.padded; ++j) row[j] = -T(__builtin_inf());
    if (p.num_k > 0 && p.mask.data != nullptr) {
      f([row, one = bias, other = mask_row](int64_t j) { return load(row + j) + load(one + j) + load(other + j); });
    } else if (p.num_k > 0 || p.mask.data != nullptr) {
      const T* one = p.num_k > 0 ? bias : mask_row;
      f([row, one](int64_t j) { return load(row + j) + load(one + j); });
    } else {
      f([row](int64_t j) { return load(row + j); });
    }
  }

  // ---- forward

  // The softmax of a tile's rows, block by block: the maxima, the sums of exp(score - maximum), what a row is to be multiplied
  // with in the end, and what all that blocks before have of it is multiplied with, since the maximum grows.
  struct Softmax {
    T top[32], sum[32], factor[32], earlier[32];
  };

  // scores -> weights before they are divided by their sum, dropped
  void forward_row(T* row, int64_t r, int64_t i, Softmax& softmax) {
    const bool first = now.n == 0;
    const T before = first ? -T(__builtin_inf()) : softmax.top[r];
    vec<T> highest = spread(before);
    with_scores(row, r, i, [&](const auto& score) {
      for (int64_t j = 0; j < now.padded; j += W) {
        const vec<T> x = score(j);
        highest = highest > x ? highest : x;
        store(row + j, x);
      }
    });
    T top = highest[0];
    for (int w = 1; w < W; ++w) top = top > highest[w] ? top : highest[w];
    const bool nothing = top == -T(__builtin_inf());
    const vec<T> base = spread(nothing ? T(0) : top);
    vec<T> total{};
    for (int64_t j = 0; j < now.padded; j += W) {
      const vec<T> x = exponential<T>(load(row + j) - base);
      total += x;
      store(row + j, x);
    }
    T sum = sum_of<T>(total);
    if (!first) {  // of nothing there is zero, or NaN
      softmax.earlier[r] = before == -T(__builtin_inf()) ? T(1) : exponential<T>(spread(before - top))[0];
      sum += softmax.sum[r] * softmax.earlier[r];
    }
    softmax.top[r] = top, softmax.sum[r] = sum;
    const bool empty = nothing && sum == 0;  // and no NaN, which the maximum does not see
    softmax.factor[r] = empty ? T(0) : 1 / sum;
    if (now.n + 1 == blocks) {
      // exp(s - inf) = 0: the backward of a row without a key is zero by itself
      static_cast<T*>(p.lse)[head * p.Lq + i] = empty ? T(__builtin_inf()) : top + T(__builtin_log(sum));
    }
    if (keep != nullptr) {
      dropout_row(keep, p.dropout_p, dropout_key(p.seed, head, i), now.first, now.padded);
      for (int64_t j = 0; j < now.padded; j += W) store(row + j, load(row + j) * load(keep + j));
    }
  }

  Tile<T> tile_of(T* numbers, int64_t tile) const {
    const int64_t first = tile * p.tile;
    return {numbers, ld, first, least(p.Lq - first, p.tile), now.keys};
  }

  void forward_tile(int64_t index) {
    const int64_t vectors = Dp / W, rows = tile_of(nullptr, index).rows, padded = round_up(rows, 8);
    Softmax softmax;
    fetch_next(index);
    begin_tile(tile_of(scores.numbers, index));
    for (int64_t n = 0; n < blocks; ++n) {
      now = block(n);
      mask_ready = mask_ready && blocks == 1;
      const Tile<T> tile = tile_of(scores.numbers, index);
      score_tile(tile);
      if (n == 0) fetch_queries(p.q, tile_of(nullptr, index + 1));
      for (int64_t from = 0; from < rows; from += 8) {
        const int64_t end = least(from + 8, rows);
        for (int64_t r = from; r < end; ++r) {
          forward_row(tile.numbers + r * ld, r, p.query_at(tile.first + r), softmax);
        }
        for (int64_t t = 0; t < p.num_v; ++t) {
          sum_rows(tile, from, p.on_v[t], weights_v[t], softmax.factor, softmax.earlier);
        }
        X::make_rows(scores, from, end - from, ld);
      }
      for (int64_t r = 0; n > 0 && r < rows; ++r) {
        for (int64_t d = 0; d < Dp; d += W) {
          store(result + r * Dp + d, load(result + r * Dp + d) * softmax.earlier[r]);
        }
      }
      product<X, false>(padded, vectors, now.keys, {scores.rows, ld}, {of_block(values).pairs, Dp},
                        {result, Dp, n > 0});
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      const int64_t width = p.on_v[t].width;
      const Weight<X>& weight = weights_v[t];
      if (!p.on_v[t].weight) continue;
      X::make_rows(weight.tile, 0, rows, width);
      product<X, false>(padded, vectors, p.on_v[t].used, {weight.tile.rows, width}, {weight.up.pairs, Dp},
                        {result, Dp, true});
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = p.query_at(index * p.tile + r);
      store_row<T>(p.out, row_of(p.out, b, h, i), result + r * Dp, p.D, softmax.factor[r]);
    }
  }

  // ---- backward

  // scores -> weights (after dropout), weights_grad -> gradient of the scores
  void backward_row(T* row, T* grad_row, int64_t r, int64_t i) {
    const vec<T> lse = spread(static_cast<const T*>(p.lse)[head * p.Lq + i]);
    vec<T> sum{}, dot{};
    with_scores(row, r, i, [&](const auto& score) {
      for (int64_t j = 0; j < Lp; j += W) {
        const vec<T> x = exponential<T>(score(j) - lse);
        sum += x;
        store(row + j, x);
      }
    });
    if (p.num_v > 0) fill_row(bias, p.on_v, p.num_v, weights_v, r, i);
    if (keep != nullptr) dropout_row(keep, p.dropout_p, dropout_key(p.seed, head, i), 0, Lp);
    for (int64_t j = 0; j < Lp; j += W) {
      vec<T> x = load(grad_row + j);
      if (p.num_v > 0) x += load(bias + j);
      if (keep != nullptr) x *= load(keep + j);
      dot += x * load(row + j);
      store(grad_row + j, x);
    }
    // lse is rounded, by more than eps where it is large: these weights add up to about 1, those below to 1
    const T total = sum_of<T>(sum);
    const vec<T> factor = spread(total == 0 ? T(0) : 1 / total), delta = factor * sum_of<T>(dot);
    for (int64_t j = 0; j < Lp; j += W) {
      const vec<T> x = load(row + j) * factor;
      store(grad_row + j, x * (load(grad_row + j) - delta));
      store(row + j, keep != nullptr ? x * load(keep + j) : x);
    }
  }

  void backward_tile(int64_t index) {
    const Tile<T> tile = tile_of(scores.numbers, index), tile_grad = tile_of(weights_grad.numbers, index);
    const int64_t rows = tile.rows, padded = round_up(rows, 8), keys8 = round_up(p.Lk, 8), vectors = Dp / W;
    fetch_next(index);
    begin_tile(tile);
    score_tile(tile);
    load_queries(grad, p.grad_out, tile.first, rows, T(1));
    X::pair_rows(query, rows, Dp);
    X::pair_rows(grad, rows, Dp);
    fetch_queries(p.q, tile_of(nullptr, index + 1));
    fetch_queries(p.grad_out, tile_of(nullptr, index + 1));
    for (int64_t t = 0; t < p.num_v; ++t) {
      const Term& term = p.on_v[t];
      if (!term.weight) continue;
      by_weight({grad.rows, Dp}, padded, weights_v[t].down, term, {weights_v[t].tile.numbers, term.width});
    }
    product<X, false>(padded, Lp / W, p.D, {grad.rows, Dp}, {values_t, 0, true}, {tile_grad.numbers, ld});
    for (int64_t from = 0; from < rows; from += 8) {
      for (int64_t r = from; r < least(from + 8, rows); ++r) {
        backward_row(tile.numbers + r * ld, tile_grad.numbers + r * ld, r, p.query_at(tile.first + r));
      }
      for (int64_t t = 0; t < p.num_k; ++t) sum_rows(tile_grad, from, p.on_k[t], weights_k[t], nullptr);
      for (int64_t t = 0; t < p.num_v; ++t) {
        if (p.on_v[t].weight) sum_rows(tile, from, p.on_v[t], weights_v[t], nullptr);
      }
    }
    X::make_pairs(scores, rows, ld);
    X::make_pairs(weights_grad, rows, ld);
    X::make_rows(weights_grad, 0, rows, ld);
    for (int64_t t = 0; t < p.num_q; ++t) sum_tile(weights_q[t].table.numbers, tile_grad, p.on_q[t]);
    product<X, true>(keys8, vectors, rows, {scores.pairs, ld}, {grad.pairs, Dp}, {grad_v, Dp, true});
    product<X, true>(keys8, vectors, rows, {weights_grad.pairs, ld}, {query.pairs, Dp}, {grad_k, Dp, true});
    product<X, false>(padded, vectors, p.Lk, {weights_grad.rows, ld}, {keys.pairs, Dp}, {result, Dp});
    for (int64_t t = 0; t < p.num_k; ++t) {
      const int64_t width = p.on_k[t].width;
      const Weight<X>& weight = weights_k[t];
      if (!p.on_k[t].weight) continue;
      X::make_rows(weight.tile, 0, rows, width);
      X::make_pairs(weight.tile, rows, width);
      product<X, true>(Dp, width / W, rows, {query.pairs, Dp}, {weight.tile.pairs, width},
                       {weight.gradient, width, true});
      product<X, false>(padded, vectors, p.on_k[t].used, {weight.tile.rows, width}, {weight.up.pairs, Dp},
                        {result, Dp, true});
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      const int64_t width = p.on_v[t].width;
      const Weight<X>& weight = weights_v[t];
      if (!p.on_v[t].weight) continue;
      X::make_pairs(weight.tile, rows, width);
      product<X, true>(width, vectors, rows, {weight.tile.pairs, width}, {grad.pairs, Dp}, {weight.gradient, Dp, true});
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = p.query_at(tile.first + r);
      store_row<T>(p.grad_q, row_of(p.grad_q, b, h, i), result + r * Dp, p.D, T(p.scale));
    }
  }

  void backward_part(int64_t part) {
    clear(sums, num_sums);
    const int64_t end = p.first_tile(part + 1);
    for (int64_t tile = p.first_tile(part); tile < end; ++tile) backward_tile(tile);
  }

  // no more than what `leave` reads
  void enter_to_leave(int64_t next) {
    head = next;
    b = head / p.H;
    h = head % p.H;
    load_rows(keys, p.k);
    X::pair_rows(keys, p.Lk, Dp);
    for (int64_t t = 0; t < p.num_q; ++t) {
      if (p.on_q[t].weight) load_weight(weights_q[t], p.on_q[t], early);
    }
  }

  void leave() {
    for (int64_t t = 0; t < p.num_q; ++t) {
      const Term& term = p.on_q[t];
      const Weight<X>& weight = weights_q[t];
      const int64_t width = term.width;
      if (term.weight) {
        X::make_rows(weight.table, 0, L8, width);
        X::make_pairs(weight.table, p.Lk, width);
        product<X, false>(L8, Dp / W, term.used, {weight.table.rows, width}, {weight.up.pairs, Dp}, {grad_k, Dp, true});
        product<X, true>(Dp, width / W, p.Lk, {keys.pairs, Dp}, {weight.table.pairs, width}, {weight.gradient, width});
        store_weight(term, weight.gradient, T(p.scale));
      } else {
        for (int64_t j = 0; j < p.Lk; ++j) {
          store_table(term, term.result, row_of(term.result, b, h, j), weight.table.numbers + j * width, T(1));
        }
      }
    }
    for (int64_t t = 0; t < p.num_k; ++t) {
      if (p.on_k[t].weight) store_weight(p.on_k[t], weights_k[t].gradient, late);
    }
    for (int64_t t = 0; t < p.num_v; ++t) {
      const Term& term = p.on_v[t];
      for (int64_t c = 0; term.weight && c < term.used; ++c) {  // the other rows are zero
        store_row<T>(term.result, row_of(term.result, b, h, term.columns[c]), weights_v[t].gradient + c * Dp, p.D);
      }
    }
    for (int64_t j = 0; j < p.Lk; ++j) {
      store_row<T>(p.grad_k, row_of(p.grad_k, b, h, j), grad_k + j * Dp, p.D, late);
      store_row<T>(p.grad_v, row_of(p.grad_v, b, h, j), grad_v + j * Dp, p.D);
    }
  }

  void store_weight(const Term& term, const T* gradient, T factor) {
    for (int64_t d = 0; d < p.D; ++d) {
      store_table(term, term.result, row_of(term.result, b, h, d), gradient + d * term.width, factor);
    }
  }
};

template <class X>
int64_t scratch_bytes(const Problem& problem) {
  return Worker<X>(problem, nullptr).arena.used;
}

// tiles [begin, end), counted over all heads
template <class X>
void forward(const Problem& problem, char* scratch, int64_t begin, int64_t end) {
  Worker<X> worker(problem, scratch);
  for (int64_t t = begin; t < end; ++t) {
    if (t / problem.tiles != worker.head) worker.enter(t / problem.tiles);
    worker.forward_tile(t % problem.tiles);
  }
}

template <class X>
int64_t kept_bytes(const Problem& problem) {
  return Worker<X>(problem, nullptr).num_sums * int64_t(sizeof(typename X::Number));
}

template <class T>
inline void add_up(T* to, const T* from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += from[c];
}

template <class X>
void backward(const Problem& problem, char* scratch, char* const* kept, int64_t begin, int64_t end) {
  using T = typename X::Number;
  Worker<X> worker(problem, scratch);
  const int64_t n = worker.num_sums, parts = problem.parts;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t head = at / parts, part = at % parts;
    if (head != worker.head) worker.enter(head);
    worker.backward_part(part);
    const auto keep = [&](T* to, const T* from) { __builtin_memcpy(to, from, std::size_t(n) * sizeof(T)); };
    if (begin > head * parts) {  // another thread has the first part
      keep(reinterpret_cast<T*>(kept[at]), worker.sums);
    } else if (part == parts - 1) {
      if (part > 0) add_up(worker.sums, worker.total, n);
      worker.leave();
    } else {
      if (part == 0) {
        keep(worker.total, worker.sums);
      } else {
        add_up(worker.total, worker.sums, n);
      }
      if (at + 1 == end) keep(reinterpret_cast<T*>(kept[head * parts]), worker.total);
    }
  }
}

// the parts of a head that several threads had
template <class X>
void finish(const Problem& problem, char* scratch, char* const* kept, int64_t head) {
  using T = typename X::Number;
  Worker<X> worker(problem, scratch);
  worker.enter_to_leave(head);
  clear(worker.sums, worker.num_sums);
  for (int64_t part = 0; part < problem.parts; ++part) {
    const char* from = kept[head * problem.parts + part];
    if (from != nullptr) add_up(worker.sums, reinterpret_cast<const T*>(from), worker.num_sums);
  }
  worker.leave();
}
