// Splits the rows of a list of weights into tasks of about equal size, for the threads. A row has
// one scale and is never split.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <vector>

namespace divqat {

struct WeightShape {
  int64_t rows;
  int64_t columns;  // contiguous elements of a row
};

struct WeightTask {
  int64_t weight;  // index into the list
  int64_t row_begin;
  int64_t row_end;
};

class WeightsPlan {
 public:
  // Tasks of up to `elements` elements, or of one row if it is longer.
  WeightsPlan(const std::vector<WeightShape>& shapes, int64_t elements) {
    for (size_t i = 0; i < shapes.size(); ++i) {
      if (shapes[i].columns == 0) continue;
      const int64_t step = std::max<int64_t>(1, elements / shapes[i].columns);
      for (int64_t row = 0; row < shapes[i].rows; row += step) {
        tasks_.push_back({int64_t(i), row, std::min(row + step, shapes[i].rows)});
      }
    }
  }

  const std::vector<WeightTask>& tasks() const { return tasks_; }

 private:
  std::vector<WeightTask> tasks_;
};

}  // namespace divqat
