#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

template struct pgolf::cuda::AttentionKernels<pgolf::cuda::bf16>;
