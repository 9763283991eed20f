#include "sublayers.h"

namespace pgolf {
namespace {

// Times of a sublayer of so many steps (SublayerMemory).
struct Clock {
  int steps;
  bool backward;  // follows
  int back(int step) const { return 2 * steps - 1 - step; }
  // When a buffer dies that the forward reads last in step `forward` and the backward in that of step `saver`.
  int until(int forward, int saver) const { return backward ? back(saver) : forward; }
};

struct Buffers {
  SublayerMemory memory;
  Clock clock;

  Buffers(int steps, int count, bool backward) : clock{steps, backward} {
    memory.steps = steps;
    memory.count = count;
  }
  void add(int buffer, const char* name, std::size_t bytes, int first, int last) {
    memory.buffers[buffer] = {name, bytes, first, last};
  }
  void add_gradient(int buffer, const char* name, std::size_t bytes, int first, int last) {
    if (clock.backward) add(buffer, name, bytes, clock.back(first), clock.back(last));
  }
  // What a piece asks for that is run in this step.
  void add_areas(const OpBytes& bytes, int step, int saved, int forward, int backward) {
    add(saved, "saved for backward", bytes.saved, step, clock.until(step, step));
    add(forward, "scratch", bytes.forward_scratch, step, step);
    add_gradient(backward, "scratch", bytes.backward_scratch, step, step);
  }
};

TensorView area(void* memory) { return TensorView(DType::u8, {0}, memory); }  // pieces know its size

namespace attention {

enum Step { kHeads, kAttend, kProject, kSteps };
enum Buffer {
  kQ,
  kK,
  kV,
  kO,
  kDo,
  kDqkv,
  kHeadsSaved,
  kHeadsForward,
  kHeadsBackward,
  kAttendSaved,
  kAttendForward,
  kAttendBackward,
  kProjectSaved,
  kProjectForward,
  kProjectBackward,
  kBuffers
};
static_assert(kBuffers <= SublayerMemory::kMost);

struct Composed {
  Qkv qkv;
  Attention attention;
  ProjectResidual project;

  Composed(const AttentionSublayer& op, DType storage) {
    const std::int64_t B = op.x.x.shape[0], T = op.x.x.shape[1], queries = op.out.x.shape[1], at = op.position;
    const std::int64_t H = op.gain.shape[0], D = op.wq.shape[0] / H, K = op.wk.shape[0] / D;
    qkv.in = project.mixed = {op.x.x, op.x0.x, op.resid_mix, op.skip.x, op.skip_weight};
    qkv.norm_scale = op.norm_scale;
    qkv.wq = op.wq;
    qkv.wk = op.wk;
    qkv.wv = op.wv;
    qkv.cos = part_of(op.cos, 0, at, T);
    qkv.sin = part_of(op.sin, 0, at, T);
    qkv.rope_dims = op.rope_dims;
    qkv.adapters = op.adapters;
    qkv.rank = op.rank;
    attention.q = qkv.q = TensorView(storage, {B, queries, H, D}, op.memory[kQ]);
    if (op.k) {
      qkv.k = part_of(op.k, 1, at, T);
      qkv.v = part_of(op.v, 1, at, T);
      attention.k = part_of(op.k, 1, 0, at + T);
      attention.v = part_of(op.v, 1, 0, at + T);
    } else {
      attention.k = qkv.k = TensorView(storage, {B, T, K, D}, op.memory[kK]);
      attention.v = qkv.v = TensorView(storage, {B, T, K, D}, op.memory[kV]);
    }
    attention.gain = op.gain;
    attention.normed = true;
    project.a = attention.o = TensorView(storage, {B, queries, H, D}, op.memory[kO]);
    project.w = op.wo;
    project.out = op.out.x;
    qkv.saved = area(op.memory[kHeadsSaved]);
    qkv.scratch = area(op.memory[kHeadsForward]);
    attention.saved = area(op.memory[kAttendSaved]);
    attention.scratch = area(op.memory[kAttendForward]);
    project.saved = area(op.memory[kProjectSaved]);
    project.scratch = area(op.memory[kProjectForward]);
  }
  // The gradients of q, k and v side by side.
  TensorView dqkv(void* memory) const {
    TensorView all = qkv.q;
    all.shape[2] += 2 * qkv.k.shape[2];
    all.data = memory;
    return all;
  }
};

}  // namespace attention

namespace mlp {

enum Step { kUp, kDown, kSteps };
enum Buffer {
  kHidden,
  kNegative,
  kDu,
  kUpSaved,
  kUpForward,
  kUpBackward,
  kDownSaved,
  kDownForward,
  kDownBackward,
  kBuffers
};
static_assert(kBuffers <= SublayerMemory::kMost);

struct Composed {
  MlpUp up;
  ProjectResidual down;

  Composed(const MlpSublayer& op, DType storage, double scale) {
    up.x = down.x = op.x.x;
    up.norm_scale = op.norm_scale;
    up.w = op.up;
    up.activation = {scale, op.negative_slope, {}};
    up.saturated = op.saturated;
    down.a = up.h = TensorView(storage, {op.x.x.shape[0], op.x.x.shape[1], op.up.shape[0]}, op.memory[kHidden]);
    if (op.negative_slope > 0)
      up.activation.negative = TensorView(DType::u8, {sign_bytes(up.h.size())}, op.memory[kNegative]);
    down.w = op.down;
    down.out = op.out.x;
    up.saved = area(op.memory[kUpSaved]);
    up.scratch = area(op.memory[kUpForward]);
    down.saved = area(op.memory[kDownSaved]);
    down.scratch = area(op.memory[kDownForward]);
  }
};

}  // namespace mlp

}  // namespace

SublayerMemory ComposedBackend::attention_sublayer_memory(const AttentionSublayer& op, bool backward) const {
  using namespace attention;
  AttentionSublayer most = op;
  if (op.k) most.position = op.k.shape[1] - op.x.x.shape[1];  // where attention reads most
  const Composed parts(most, dtype());
  const OpBytes attend = attention_bytes(parts.attention);  // first, as it says most clearly what heads may be
  const std::size_t keys = op.k ? 0 : parts.qkv.k.bytes();

  Buffers buffers(kSteps, kBuffers, backward);
  const int read = buffers.clock.until(kAttend, kAttend);
  buffers.add(kQ, "q", parts.qkv.q.bytes(), kHeads, read);
  buffers.add(kK, "k", keys, kHeads, read);
  buffers.add(kV, "v", keys, kHeads, read);
  buffers.add(kO, "attention outputs", parts.attention.o.bytes(), kAttend, buffers.clock.until(kProject, kAttend));
  buffers.add_gradient(kDo, "gradients, attention", parts.attention.o.bytes(), kProject, kAttend);
  buffers.add_gradient(kDqkv, "gradients, attention", parts.dqkv(nullptr).bytes(), kAttend, kHeads);
  buffers.add_areas(qkv_bytes(parts.qkv), kHeads, kHeadsSaved, kHeadsForward, kHeadsBackward);
  buffers.add_areas(attend, kAttend, kAttendSaved, kAttendForward, kAttendBackward);
  buffers.add_areas(project_residual_bytes(parts.project), kProject, kProjectSaved, kProjectForward, kProjectBackward);
  return buffers.memory;
}

void ComposedBackend::attention_sublayer_forward(const AttentionSublayer& op) {
  const attention::Composed parts(op, dtype());
  qkv_forward(parts.qkv);
  attention_forward(parts.attention);
  project_residual_forward(parts.project);
}

// The attention's backward goes on past norm and RoPE of q and k.
void ComposedBackend::attention_sublayer_backward(const AttentionSublayer& op, const AttentionSublayerGrads& grads) {
  using namespace attention;
  const Composed parts(op, dtype());
  ProjectResidualGrads project;
  project.dout = grads.dx;
  project.da = parts.attention.o;
  project.da.data = op.memory[kDo];
  project.w = grads.wo;
  project.scratch = area(op.memory[kProjectBackward]);
  project_residual_backward(parts.project, project);

  AttentionGrads attend;
  attend.d_o = project.da;
  attend.dqkv = parts.dqkv(op.memory[kDqkv]);
  attend.norms = {parts.qkv.cos, parts.qkv.sin, parts.qkv.saved, parts.qkv.rope_dims};
  attend.gain = grads.gain;
  attend.scratch = area(op.memory[kAttendBackward]);
  attention_backward(parts.attention, attend);

  QkvGrads heads;
  heads.dqkv = attend.dqkv;
  if (grads.inputs) heads.dx = grads.dx;
  heads.dx0 = grads.dx0;
  heads.dskip = grads.dskip;
  heads.pending = grads.pending;
  heads.resid_mix = grads.resid_mix;
  heads.skip_weight = grads.skip_weight;
  heads.wq = grads.wq;
  heads.wk = grads.wk;
  heads.wv = grads.wv;
  heads.adapters = grads.adapters;
  heads.scratch = area(op.memory[kHeadsBackward]);
  qkv_backward(parts.qkv, heads);
}

// Squares could leave float16's range (65,504).
double ComposedBackend::mlp_down_factor() const { return precision() == DType::f16 ? 0x1p4 : 1.0; }

SublayerMemory ComposedBackend::mlp_sublayer_memory(const MlpSublayer& op, bool backward) const {
  using namespace mlp;
  const Composed parts(op, dtype(), 1.0);
  Buffers buffers(kSteps, kBuffers, backward);
  buffers.add(kHidden, "mlp hidden", parts.up.h.bytes(), kUp, buffers.clock.until(kDown, kDown));
  if (backward && parts.up.activation.negative)
    buffers.add(kNegative, "mlp signs", parts.up.activation.negative.bytes(), kUp, buffers.clock.until(kUp, kDown));
  buffers.add_gradient(kDu, "gradients, mlp", parts.up.h.bytes(), kDown, kUp);
  buffers.add_areas(mlp_up_bytes(parts.up), kUp, kUpSaved, kUpForward, kUpBackward);
  buffers.add_areas(project_residual_bytes(parts.down), kDown, kDownSaved, kDownForward, kDownBackward);
  return buffers.memory;
}

void ComposedBackend::mlp_sublayer_forward(const MlpSublayer& op) {
  const mlp::Composed parts(op, dtype(), 1.0 / mlp_down_factor());
  mlp_up_forward(parts.up);
  project_residual_forward(parts.down);
}

// The activation's slope is taken where the gradient at the hidden values is made, which never reaches memory.
void ComposedBackend::mlp_sublayer_backward(const MlpSublayer& op, const MlpSublayerGrads& grads) {
  using namespace mlp;
  const Composed parts(op, dtype(), 1.0 / mlp_down_factor());
  ProjectResidualGrads down;
  down.activation = parts.up.activation;
  down.dout = grads.dx;
  down.da = parts.up.h;
  down.da.data = op.memory[kDu];
  down.w = grads.down;
  down.scratch = area(op.memory[kDownBackward]);
  project_residual_backward(parts.down, down);

  MlpUpGrads up;
  up.du = down.da;
  up.dx = grads.dx;
  up.w = grads.up;
  up.scratch = area(op.memory[kUpBackward]);
  mlp_up_backward(parts.up, up);
}

}  // namespace pgolf
