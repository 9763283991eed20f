#include "model/passes.h"

namespace pgolf {

// A U-net: the first half of the layers push what they make, the others pop it, the last first.
std::vector<Pass> passes_of(const ModelConfig& config) {
  const auto layers = static_cast<std::size_t>(config.num_layers);
  const auto encoders = static_cast<std::size_t>(config.encoder_layers());
  std::vector<Pass> passes;
  std::vector<std::size_t> pushed;
  std::size_t skips = 0;
  for (std::size_t layer = 0; layer < layers; ++layer) {
    Pass pass{layer, layer, layer + 1, layer < encoders, {}, 0};
    if (pass.pushes) {
      pushed.push_back(pass.out);
    } else if (!pushed.empty()) {
      pass.popped = pushed.back();
      pushed.pop_back();
      pass.skip = skips++;
    }
    passes.push_back(pass);
  }
  return passes;
}

}  // namespace pgolf
