// Test-time training: low-rank adapters for a batch of documents, scored and trained window by window.  docs/spec.md §5
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/gpt.h"

namespace pgolf {

// A window's tokens, and the first of its positions that the head computes.
struct WindowShape {
  std::int64_t length, first;
};

struct AdapterSettings {
  std::int64_t rows, rank;  // rows: documents at once
  std::vector<WindowShape> windows;
  std::uint64_t seed;
  double lr, beta1, beta2, eps;
};

class DocumentAdapters {
 public:
  // Plans the passes of all windows: from the second window of a shape on nothing is allocated.
  DocumentAdapters(std::shared_ptr<GPT> model, const AdapterSettings& settings);
  ~DocumentAdapters();
  DocumentAdapters(const DocumentAdapters&) = delete;
  DocumentAdapters& operator=(const DocumentAdapters&) = delete;

  // Row b starts on document documents[b], with adapters that only the seed and the document decide; −1: it goes on.
  void begin(const std::int32_t* documents);
  // Scores a window of every row and then, with the gradients of the same pass, trains the rows with steps[b] = t ≥ 1
  // on the mean loss of their positions scored[2b] … scored[2b + 1] − 1: Adam's step t. ids, targets: [rows, length].
  // Returns a ticket for backend().wait: the losses [rows, length − first], of the master dtype.
  int window(const std::int32_t* ids, const std::int32_t* targets, const std::int32_t* scored,
             const std::int32_t* steps, const WindowShape& shape);

  const AdapterSettings& settings() const { return settings_; }
  // In state-dict order of the operations: blocks 0, 1, …, then the head.
  const std::vector<AdapterRows>& adapters() const { return adapters_; }
  std::size_t bytes() const { return numbers_.bytes() + arena_.bytes() + rope_.bytes() + control_.bytes(); }

 private:
  void make_adapters();
  void make_plans();
  void bind(Plan& plan) const;
  Plan& plan_of(const WindowShape& shape);

  std::shared_ptr<GPT> model_;
  AdapterSettings settings_;
  DeviceMemory numbers_, arena_, rope_, control_;
  std::vector<AdapterRows> adapters_;
  TensorView cos_, sin_, documents_, steps_, weights_;
  std::vector<double> row_weights_;    // for the upload to weights_ …
  std::vector<float> narrow_weights_;  // … in float32 where that is the master dtype
  std::vector<std::unique_ptr<Plan>> plans_;
};

}  // namespace pgolf
