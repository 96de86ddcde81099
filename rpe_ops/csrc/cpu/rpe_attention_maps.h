// Maps of rpe_attention: from a tensor and four sizes to what kernels read. A grid's map costs as much as its offsets; of
// free ids nothing is kept but the lowest.

#pragma once

#include "rpe_attention.h"

#include "../check.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace rpe_ops {

struct MapSizes {
  int64_t height, width, skip, num_buckets;
};

// A map with all that it points to.
class OwnedMap {
 public:
  // of `rows` tokens whose tables are read against `cols` others, on queries transposed
  OwnedMap(const Tensor& tensor, const MapSizes& sizes, int64_t rows, int64_t cols, bool on_q, const char* name)
      : rows_(rows), cols_(cols), on_q_(on_q), sizes_(sizes) {
    const auto [h, w, skip, buckets] = sizes;
    check(buckets >= 0 && buckets < int64_t(1) << 31, name, ": num_buckets=", buckets, "; expected below 2^31");
    if (h == 0 && w == 0 && skip == 0) {
      read_free(tensor, name);
      return;
    }
    check(
        h > 0 && h <= rows && w > 0 && w <= rows && skip >= 0 && skip <= rows && skip + h * w == rows && rows == cols,
        name, ": height=", h, ", width=", w, ", skip=", skip, " for ", rows, " x ", cols,
        " tokens; expected skip + height * width of them on both sides, or 0, 0, 0 for free ids");
    check(skip == 0 || buckets > 0, name, ": skip=", skip, " and no bucket for it");
    check(tensor.scalar_type() == ScalarType::Int && tensor.dim() > 0 && tensor.dim() <= 2, name,
          ": the map of a grid is int32, of 1 dimension (axes) or 2 (offsets)");
    map.height = h, map.width = w, map.skip = skip;
    const int32_t* data = static_cast<const int32_t*>(tensor.const_data_ptr());
    if (tensor.dim() == 1) {
      check(tensor.size(0) == 2 * (h + w) - 2, name, ": the axes have ", tensor.size(0), " numbers; expected ",
            2 * (h + w) - 2, ", 2 height - 1 and 2 width - 1");
      const int64_t step = tensor.stride(0);
      for (int64_t n = 0; n < 2 * h - 1; ++n) row_axis_.push_back(data[n * step]);
      for (int64_t n = 2 * h - 1; n < 2 * (h + w) - 2; ++n) col_axis_.push_back(data[n * step]);
      check_bucket(*std::min_element(row_axis_.begin(), row_axis_.end()) +
                   *std::min_element(col_axis_.begin(), col_axis_.end()));
      check_bucket(*std::max_element(row_axis_.begin(), row_axis_.end()) +
                   *std::max_element(col_axis_.begin(), col_axis_.end()));
      if (!read_axes()) {
        read_offsets([this](int64_t dr, int64_t dc) { return row_axis_[size_t(dr)] + col_axis_[size_t(dc)]; });
      }
    } else {
      check(tensor.size(0) == 2 * h - 1 && tensor.size(1) == 2 * w - 1, name, ": the offsets have shape ",
            shape_of(tensor), "; expected (", 2 * h - 1, ", ", 2 * w - 1, ")");
      const int64_t row = tensor.stride(0), column = tensor.stride(1);
      read_offsets([=](int64_t dr, int64_t dc) { return int64_t(data[dr * row + dc * column]); });
    }
  }

  // on queries, where the grid that orders them is another one
  void make_odd() {
    if (map.kind == Map::axes) {
      columns_.clear();
      read_offsets([this](int64_t dr, int64_t dc) { return row_axis_[size_t(dr)] + col_axis_[size_t(dc)]; });
    }
    map.odd = true;
  }

  bool narrow() const { return columns_.size() <= 256; }

  void describe(Term& term) const {
    term.map = map;
    term.columns = columns_.data();
    term.used = int64_t(columns_.size());
    term.narrow = narrow();
    term.buckets = sizes_.num_buckets;
    term.dense = true;
    for (size_t c = 1; c < columns_.size(); ++c) term.dense = term.dense && columns_[c] == columns_[c - 1] + 1;
  }

  Map map;

 private:
  void check_bucket(int64_t bucket) const { check_in_table(bucket, bucket, sizes_.num_buckets); }

  void read_free(const Tensor& ids, const char* name) {
    check(ids.dim() == 2 && ids.size(0) == rows_ && ids.size(1) == cols_, name, ": ids have shape ", shape_of(ids),
          "; expected (", rows_, ", ", cols_, ")");
    map.kind = Map::free;
    map.ids = ids.const_data_ptr();
    map.row = ids.stride(0), map.column = ids.stride(1);
    switch (ids.scalar_type()) {
      case ScalarType::Byte: return read_ids<uint8_t>();
      case ScalarType::Short: return read_ids<int16_t>();
      case ScalarType::Int: return read_ids<int32_t>();
      case ScalarType::Long: return read_ids<int64_t>();
      default: check(false, name, ": ids are neither uint8, int16, int32 nor int64");
    }
  }

  template <class Id>
  void read_ids() {
    map.bytes = sizeof(Id);
    if (rows_ * cols_ == 0) return;
    const Id* ids = static_cast<const Id*>(map.ids);
    // rows or, where these are strided, columns
    const bool across = map.column <= map.row;
    const int64_t lines = across ? rows_ : cols_, numbers = across ? cols_ : rows_;
    const int64_t line = across ? map.row : map.column, step = across ? map.column : map.row;
    std::vector<Id> lowest(size_t(lines), ids[0]), highest(size_t(lines), ids[0]);
    torch::stable::parallel_for(0, lines, std::max<int64_t>(1, (1 << 16) / numbers), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Id* at = ids + i * line;
        Id low = at[0], high = at[0];
        for (int64_t j = 0; j < numbers; ++j) {
          const Id id = at[j * step];
          low = std::min(low, id);
          high = std::max(high, id);
        }
        lowest[size_t(i)] = low, highest[size_t(i)] = high;
      }
    });
    const int64_t low = *std::min_element(lowest.begin(), lowest.end());
    const int64_t high = *std::max_element(highest.begin(), highest.end());
    check_in_table(low, high, sizes_.num_buckets);
    map.lowest = low;
    for (int64_t n = low; n <= high; ++n) columns_.push_back(int32_t(n));
  }

  // The runs of an axis of equal values, from its end on; false where a value has two.
  static bool find_runs(const std::vector<int64_t>& axis, std::vector<int32_t>& run_of, std::vector<int32_t>& start) {
    const int64_t count = int64_t(axis.size());
    std::vector<int64_t> values;
    for (int64_t x = 0; x < count; ++x) {
      const int64_t value = axis[size_t(count - 1 - x)];
      if (values.empty() || values.back() != value) {
        values.push_back(value);
        start.push_back(int32_t(x));
      }
      run_of.push_back(int32_t(values.size()) - 1);
    }
    start.push_back(int32_t(count));
    std::sort(values.begin(), values.end());
    return std::adjacent_find(values.begin(), values.end()) == values.end();
  }

  // False where the map is no product of slots, so that its ids have to be found one by one.
  bool read_axes() {
    std::vector<int32_t> col_run, col_start;
    run_of_.clear(), run_start_.clear();
    if (!find_runs(row_axis_, run_of_, run_start_) || !find_runs(col_axis_, col_run, col_start)) return false;
    const int64_t rows = int64_t(run_start_.size()) - 1, cols = int64_t(col_start.size()) - 1;
    const auto value = [](const std::vector<int64_t>& axis, const std::vector<int32_t>& start, int64_t slot) {
      return axis[axis.size() - size_t(start[start.size() - 1 - size_t(slot)])];
    };
    const int64_t outer = on_q_ ? cols : rows, inner = on_q_ ? rows : cols;
    for (int64_t a = 0; a < outer; ++a) {
      for (int64_t b = 0; b < inner; ++b) {
        columns_.push_back(int32_t(
            value(row_axis_, run_start_, on_q_ ? b : a) + value(col_axis_, col_start, on_q_ ? a : b)));
      }
    }
    map.skip_id = int32_t(columns_.size());
    if (map.skip > 0) columns_.push_back(int32_t(sizes_.num_buckets - 1));
    std::vector<int32_t> sorted = columns_;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
      columns_.clear();
      return false;
    }
    col_slot_.assign(size_t(16), 0);
    for (const int32_t run : col_run) col_slot_.push_back(int32_t(cols - 1 - run));
    col_slot_.insert(col_slot_.end(), 16, 0);
    map.kind = Map::axes;
    map.row_slots = rows, map.col_slots = cols;
    for (size_t x = 0; x < run_of_.size(); ++x) goes_on_.push_back(x > 0 && run_of_[x] == run_of_[x - 1] ? -1 : 0);
    for (size_t x = 0; x < col_run.size(); ++x) col_goes_on_.push_back(x > 0 && col_run[x] == col_run[x - 1] ? -1 : 0);
    map.goes_on = goes_on_.data(), map.col_goes_on = col_goes_on_.data();
    map.run_of = run_of_.data(), map.run_start = run_start_.data(), map.col_slot = col_slot_.data() + 16;
    return true;
  }

  template <class Bucket>
  void read_offsets(const Bucket& bucket) {
    const int64_t rows = 2 * map.height - 1, cols = 2 * map.width - 1;
    std::vector<int32_t> all;
    for (int64_t dr = 0; dr < rows; ++dr) {
      for (int64_t dc = 0; dc < cols; ++dc) {
        const int64_t here = bucket(dr, dc);
        check_bucket(here);
        all.push_back(int32_t(here));
      }
    }
    columns_ = all;
    if (map.skip > 0) columns_.push_back(int32_t(sizes_.num_buckets - 1));
    std::sort(columns_.begin(), columns_.end());
    columns_.erase(std::unique(columns_.begin(), columns_.end()), columns_.end());
    const auto compact = [&](int32_t column) {
      return std::lower_bound(columns_.begin(), columns_.end(), column) - columns_.begin();
    };
    if (map.skip > 0) map.skip_id = int32_t(compact(int32_t(sizes_.num_buckets - 1)));
    map.kind = Map::offsets;
    map.stride = (on_q_ ? rows : cols) + 16;
    const auto write = [&](auto zero) {
      using Id = decltype(zero);
      offsets_ = std::vector<char>(size_t((on_q_ ? cols : rows) * map.stride) * sizeof(Id), 0);
      Id* to = reinterpret_cast<Id*>(offsets_.data());
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < cols; ++x) {
          const int32_t column = all[size_t((rows - 1 - y) * cols + (cols - 1 - x))];
          to[on_q_ ? x * map.stride + y : y * map.stride + x] = Id(compact(column));
        }
      }
      map.of_offset = to;
      // rows of the reversed map that are alike
      earlier_.assign(size_t(rows), -1), later_.assign(size_t(rows), int32_t(rows));
      std::unordered_multimap<uint64_t, std::pair<int64_t, int64_t>> kinds;  // by hash: the first of a kind, its last
      for (int64_t y = 0; y < rows; ++y) {
        const int32_t* here = all.data() + (rows - 1 - y) * cols;
        uint64_t hash = 0;
        for (int64_t x = 0; x < cols; ++x) hash = (hash ^ uint64_t(here[x])) * 0x9e3779b97f4a7c15u;
        bool found = false;
        const auto [begin, end] = kinds.equal_range(hash);
        for (auto kind = begin; kind != end && !found; ++kind) {
          found = std::equal(here, here + cols, all.data() + (rows - 1 - kind->second.first) * cols);
          if (!found) continue;
          earlier_[size_t(y)] = int32_t(kind->second.second);
          later_[size_t(kind->second.second)] = int32_t(y);
          kind->second.second = y;
        }
        if (!found) kinds.insert({hash, {y, y}});
      }
      map.earlier = earlier_.data(), map.later = later_.data();
    };
    if (narrow()) {
      write(uint8_t{});
    } else {
      write(int32_t{});
    }
  }

  int64_t rows_, cols_;
  bool on_q_;
  MapSizes sizes_;
  std::vector<int64_t> row_axis_, col_axis_;
  std::vector<int32_t> columns_, run_of_, run_start_, goes_on_, col_goes_on_, col_slot_, earlier_, later_;
  std::vector<char> offsets_;
};

}  // namespace rpe_ops
