// What follows from the norm of all gradients, the same on every backend, whose `grad_norm` ends with it.
// docs/spec.md §3
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "backend.h"

#if defined(__CUDACC__)
#define PGOLF_ON_DEVICE __host__ __device__
#else
#define PGOLF_ON_DEVICE
#endif

namespace pgolf {

inline constexpr double kLeastLossScale = 0x1p-14, kMostLossScale = 0x1p24;
inline constexpr std::int32_t kCleanSteps = 2000;  // that double it

// Whether the step counts, its clip factor, the next loss scale, Adam's count. scaled_norm: with the loss scale.
PGOLF_ON_DEVICE PGOLF_INLINE void settle_step(double scaled_norm, StepValues* v) {
  const bool overflow = !(scaled_norm <= DBL_MAX);  // infinite or NaN
  const double loss_scale = v->loss_scale;
  v->grad_norm = scaled_norm / loss_scale;
  if (overflow && !v->scaling) v->stopped = 1;
  v->finite = !overflow && !v->stopped;
  if (v->scaling && !v->stopped) {
    if (!overflow) {
      v->clean = v->clean < 0 ? 1 : v->clean + 1;
    } else if (loss_scale > kLeastLossScale) {
      v->clean = 0;
      v->loss_scale = loss_scale / 2;
    } else {
      v->clean = v->clean > 0 ? -1 : v->clean - 1;
    }
    if (v->clean == kCleanSteps) {
      v->clean = 0;
      if (loss_scale < kMostLossScale) v->loss_scale = loss_scale * 2;
    }
  }
  if (!v->finite) return;
  const double clip = v->clip > 0 ? v->clip / (v->grad_norm + 1e-6) : 1.0;
  v->grad_scale = (clip < 1.0 ? clip : 1.0) / loss_scale;
  ++v->adam_steps;
  v->bias1 = 1.0 - std::pow(v->beta1, static_cast<double>(v->adam_steps));
  v->bias2 = 1.0 - std::pow(v->beta2, static_cast<double>(v->adam_steps));
}

}  // namespace pgolf
