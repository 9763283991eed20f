// A step of AdamW for one number, and the constants that all numbers of a step share.
#pragma once

namespace pgolf::cuda {

// What a step's numbers are multiplied by.
struct AdamConstants {
  float beta1, beta2, rest1, rest2, eps, root_bias2, scale, rate, keep;
  int finite;

  __device__ void set(double b1, double b2, double epsilon, double bias1, double bias2, double grad_scale, double lr,
                      double decay) {
    beta1 = static_cast<float>(b1);
    beta2 = static_cast<float>(b2);
    rest1 = static_cast<float>(1.0 - b1);
    rest2 = static_cast<float>(1.0 - b2);
    eps = static_cast<float>(epsilon);
    root_bias2 = static_cast<float>(sqrt(bias2));
    scale = static_cast<float>(grad_scale);
    rate = static_cast<float>(lr / bias1);
    keep = static_cast<float>(1.0 - lr * decay);
  }
  __device__ __forceinline__ void step(float grad, float& w, float& m, float& v) const {
    const float g = grad * scale;
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * g * g;
    w = w * keep - rate * m / (sqrtf(v) / root_bias2 + eps);
  }
};

}  // namespace pgolf::cuda
