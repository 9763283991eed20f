// A backend's sublayers composed of its pieces, one after another. A backend that fuses more, or keeps less, overrides
// a sublayer whole.
#pragma once

#include "pieces.h"

namespace pgolf {

class ComposedBackend : public Backend, public Pieces {
 public:
#define PGOLF_METHOD(result, name, parameters, arguments) result name parameters override;
#include "sublayer_methods.def"
#undef PGOLF_METHOD

  Pieces& pieces() override { return *this; }
};

}  // namespace pgolf
