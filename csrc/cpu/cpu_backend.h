// The CPU backend: the plain reading of backend.h, fused only as far as a cache asks for.
#pragma once

#include "core/parallel.h"
#include "cpu/isa.h"
#include "cpu/rounding.h"
#include "sublayers.h"

PGOLF_CPU_BEGIN

template <class T>
class CpuBackend final : public ComposedBackend {
 public:
  explicit CpuBackend(Rounding rounding) : rounding_(rounding) {}
  ~CpuBackend() override;

#define PGOLF_METHOD(result, name, parameters, arguments) result name parameters override;
#include "backend_methods.def"
#include "piece_methods.def"
#undef PGOLF_METHOD
  int capture(int recording, const std::function<void()>& fn) override;

 private:
  void round(T* x, std::int64_t count) const { round_values(rounding_, x, count); }
  void copy_adapters(const AdapterRows& adapters, std::int64_t row) const;

  Rounding rounding_;
  int next_read_ = 0;
  // A step's values fit in place; more is allocated when it is first read.
  struct Read {
    unsigned char small[512];
    unsigned char* large = nullptr;
    std::size_t room = 0;
  } reads_[kReads];
};

PGOLF_CPU_END
