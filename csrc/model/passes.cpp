#include "model/passes.h"

namespace pgolf {

// A U-net: the first half of the places push what they make, the others pop it, the last first.
std::vector<Pass> passes_of(const ModelConfig& config, bool looping) {
  const std::vector<std::size_t> order = config.layer_order(looping);
  const std::size_t encoders = order.size() / 2;
  std::vector<Pass> passes;
  std::vector<std::size_t> pushed;
  std::size_t skips = 0;
  for (std::size_t place = 0; place < order.size(); ++place) {
    Pass pass{order[place], place, place + 1, place < encoders, {}, 0};
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
